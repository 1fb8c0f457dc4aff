"""The engine in its thread: streams, aborts, errors, an event loop that stays free."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from engine import async_engine
from engine.async_engine import AsyncEngine
from engine.config import ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.types import EngineDeadError, FinishReason, GenerationRequest, InvalidRequestError, SamplingParams
from engine.weights.manifest import CheckpointError
from tests.models import write_config

LONG = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = write_config(tmp_path_factory.mktemp("models") / "tiny")
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    return EngineConfig(ModelConfig(str(path), load_format="random"), scheduler=scheduler, stream_interval_s=0)


@pytest.fixture
async def engine(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(config)
    yield engine
    await engine.stop()


def request(request_id: str, max_tokens: int = 8, prompt: tuple[int, ...] = (1, 2, 3)) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))


async def collect(engine: AsyncEngine, request: GenerationRequest) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


async def test_concurrent_streams_each_get_their_own_tokens(engine: AsyncEngine) -> None:
    prompts = [(i + 1, i + 2) for i in range(20)]
    alone = [await collect(engine, request(f"alone{i}", prompt=p)) for i, p in enumerate(prompts)]
    together = await asyncio.gather(*(collect(engine, request(f"t{i}", prompt=p)) for i, p in enumerate(prompts)))
    assert together == alone


async def test_closing_a_stream_frees_its_blocks(engine: AsyncEngine) -> None:
    async with aclosing(engine.generate(request("a", LONG))) as stream:
        async for _ in stream:
            break
    await collect(engine, request("b"))  # the abort was queued before
    assert engine.stats().num_running == 0
    assert engine.stats().kv_used_frac == 0


async def test_abort_ends_the_stream_with_its_reason(engine: AsyncEngine) -> None:
    outputs = []
    async for output in engine.generate(request("a", LONG)):
        outputs.append(output)
        engine.abort("a")
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert outputs[-1].usage is not None


async def test_a_bad_request_fails_alone(engine: AsyncEngine) -> None:
    good = asyncio.create_task(collect(engine, request("good", 30)))
    with pytest.raises(InvalidRequestError):
        await collect(engine, request("bad", prompt=()))
    assert len(await good) == 30


async def test_the_event_loop_stays_free_while_the_engine_works(engine: AsyncEngine) -> None:
    tasks = [asyncio.create_task(collect(engine, request(str(i), 60))) for i in range(8)]
    num_turns = 0
    while not all(task.done() for task in tasks):
        num_turns += 1
        await asyncio.sleep(0)
    assert num_turns > 5 * 60  # far more than there are steps
    assert [len(task.result()) for task in tasks] == [60] * 8


async def test_coalescing_loses_nothing(config: EngineConfig) -> None:
    plain = await AsyncEngine.start(config)
    coalescing = await AsyncEngine.start(EngineConfig(config.model, scheduler=config.scheduler, stream_interval_s=0.5))
    expected = [output async for output in plain.generate(request("a", 100))]
    outputs = [output async for output in coalescing.generate(request("a", 100))]
    assert len(outputs[0].token_ids) == 1  # the first token goes at once
    assert len(outputs) < len(expected)
    assert sum((o.token_ids for o in outputs), ()) == sum((o.token_ids for o in expected), ())
    assert "".join(o.text for o in outputs) == "".join(o.text for o in expected)
    await plain.stop()
    await coalescing.stop()


async def test_stopping_ends_open_streams_with_an_error(config: EngineConfig) -> None:
    engine = await AsyncEngine.start(config)
    task = asyncio.create_task(collect(engine, request("a", LONG)))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0.01)
    await engine.stop()
    with pytest.raises(EngineDeadError):
        await task
    with pytest.raises(EngineDeadError):
        engine.check_health()


async def test_a_failing_step_ends_every_stream_and_shows_in_health(config: EngineConfig) -> None:
    engine = await AsyncEngine.start(config)
    task = asyncio.create_task(collect(engine, request("a", LONG)))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0.01)
    engine._commands.put(lambda: 1 / 0)  # any exception in the engine's thread
    with pytest.raises(EngineDeadError, match="division by zero"):
        await task
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("b"))
    await engine.stop()


async def test_a_wedged_engine_is_unhealthy_until_it_goes_on(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its requests are dropped, as the replica does; it stays unhealthy without them."""
    monkeypatch.setattr(async_engine, "STALLED_S", 1.0)
    monkeypatch.setattr(async_engine, "STALLED_STEPS", 0)
    engine = await AsyncEngine.start(config)
    task = asyncio.create_task(collect(engine, request("a", LONG)))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0.01)
    hanging = threading.Event()
    engine._commands.put(hanging.wait)
    await until_unhealthy(engine)
    engine.drop("a")
    task.cancel()
    with pytest.raises(EngineDeadError, match="no progress"):
        engine.check_health()
    with pytest.raises(EngineDeadError, match="no progress"):
        await collect(engine, request("b"))
    hanging.set()
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(EngineDeadError):
                assert len(await collect(engine, request("c"))) == 8
                break
            await asyncio.sleep(0.01)
    await engine.stop()


async def test_an_idle_engine_is_healthy(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "STALLED_S", 1.0)
    engine = await AsyncEngine.start(config)
    for _ in range(15):
        await asyncio.sleep(0.1)
        engine.check_health()
    await engine.stop()


async def test_stopping_a_wedged_engine_leaves_its_thread_and_ends_its_streams(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "STOP_TIMEOUT_S", 0.1)
    engine, hanging = await AsyncEngine.start(config), threading.Event()
    task = asyncio.create_task(collect(engine, request("a", LONG)))
    while engine.stats().num_running == 0:
        await asyncio.sleep(0.01)
    engine._commands.put(hanging.wait)
    await engine.stop()
    with pytest.raises(EngineDeadError, match="stopping"):
        await task
    hanging.set()


async def until_unhealthy(engine: AsyncEngine) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                engine.check_health()
            except EngineDeadError:
                return
            await asyncio.sleep(0.01)


async def test_start_reports_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        await AsyncEngine.start(EngineConfig(ModelConfig(str(tmp_path))))
    write_config(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        await AsyncEngine.start(EngineConfig(ModelConfig(str(tmp_path / "tiny"))))
