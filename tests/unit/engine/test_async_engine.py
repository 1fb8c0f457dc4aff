"""The engine in its thread: streams, aborts, errors, an event loop that stays free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import async_engine
from engine.async_engine import AsyncEngine
from engine.config import ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.types import (
    EngineDeadError,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from engine.weights.manifest import CheckpointError
from tests.models import write_config
from tests.unit.engine.stepping import Clock
from tests.waiting import until_async

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


@asynccontextmanager
async def held(engine: AsyncEngine) -> AsyncIterator[None]:
    """The engine's thread stands still between two steps. What it is told meanwhile is done before the next one."""
    reached, go_on = threading.Event(), threading.Event()
    engine._commands.put(lambda: (reached.set(), go_on.wait()))
    await until_async(reached.is_set)
    try:
        yield
    finally:
        go_on.set()


def hold_after_outputs(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From the first outputs on its thread stands still until the event is set."""
    go_on, send = threading.Event(), engine._send

    def send_and_wait(outputs: list[RequestOutput]) -> None:
        send(outputs)
        if outputs:
            go_on.wait()

    monkeypatch.setattr(engine, "_send", send_and_wait)
    return go_on


async def start_collecting(engine: AsyncEngine, request: GenerationRequest) -> asyncio.Task[list[int]]:
    """The request is submitted when this returns."""
    task = asyncio.create_task(collect(engine, request))
    await asyncio.sleep(0)
    return task


async def test_closing_a_stream_frees_its_blocks(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold_after_outputs(engine, monkeypatch)
    async with aclosing(engine.generate(request("a", LONG))) as stream:
        await anext(stream)
    go_on.set()
    await collect(engine, request("b"))  # the abort was queued before
    assert engine.stats().num_running == 0
    assert engine.stats().kv_used_frac == 0
    assert engine.request_log.find("a")[0].finish_reason == "abort"


async def test_abort_ends_the_stream_with_its_reason(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold_after_outputs(engine, monkeypatch)
    outputs = []
    async for output in engine.generate(request("a", LONG)):
        outputs.append(output)
        engine.abort("a")
        go_on.set()
    assert len(outputs) == 2
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert outputs[-1].usage is not None


async def test_a_bad_request_fails_alone(engine: AsyncEngine) -> None:
    good = asyncio.create_task(collect(engine, request("good", 30)))
    with pytest.raises(InvalidRequestError):
        await collect(engine, request("bad", prompt=()))
    assert len(await good) == 30


async def test_the_event_loop_stays_free_while_a_step_runs(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes: here until the loop has done all that it had to do."""
    step, may_step = engine._engine.step, threading.Event()
    monkeypatch.setattr(engine._engine, "step", lambda: may_step.wait() and step())
    tasks = [await start_collecting(engine, request(str(i), 60)) for i in range(8)]
    for _ in range(1000):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    may_step.set()
    assert [len(tokens) for tokens in await asyncio.gather(*tasks)] == [60] * 8


async def test_coalescing_loses_nothing(config: EngineConfig) -> None:
    plain = await AsyncEngine.start(config)
    coalescing = await AsyncEngine.start(EngineConfig(config.model, scheduler=config.scheduler, stream_interval_s=3600))
    expected = [output async for output in plain.generate(request("a", 100))]
    outputs = [output async for output in coalescing.generate(request("a", 100))]
    assert [len(o.token_ids) for o in expected] == [1] * 100
    assert [len(o.token_ids) for o in outputs] == [1, 99]  # the first token goes at once
    assert sum((o.token_ids for o in outputs), ()) == sum((o.token_ids for o in expected), ())
    assert "".join(o.text for o in outputs) == "".join(o.text for o in expected)
    await plain.stop()
    await coalescing.stop()


async def test_stopping_ends_open_streams_with_an_error(config: EngineConfig) -> None:
    engine = await AsyncEngine.start(config)
    async with held(engine):
        task = await start_collecting(engine, request("a", LONG))
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
    await stopping
    with pytest.raises(EngineDeadError):
        await task
    with pytest.raises(EngineDeadError):
        engine.check_health()


async def test_a_failing_step_ends_every_stream_and_shows_in_health(config: EngineConfig) -> None:
    engine = await AsyncEngine.start(config)
    async with held(engine):
        task = await start_collecting(engine, request("a", LONG))
        engine._commands.put(lambda: 1 / 0)  # any exception in the engine's thread
    with pytest.raises(EngineDeadError, match="division by zero"):
        await task
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("b"))
    await engine.stop()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The engine's health by a clock that the test turns."""
    clock = Clock()
    monkeypatch.setattr(async_engine, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(async_engine, "STALLED_STEPS", 0)
    return clock


def look_for(seconds: int, engine: AsyncEngine, clock: Clock) -> None:
    """At its health, once a second."""
    for _ in range(seconds):
        clock.now_s += 1.0
        engine.check_health()


def is_healthy(engine: AsyncEngine) -> bool:
    try:
        engine.check_health()
    except EngineDeadError:
        return False
    return True


async def test_a_wedged_engine_is_unhealthy_until_it_goes_on(config: EngineConfig, clock: Clock) -> None:
    """Its requests are dropped, as the replica does; it stays unhealthy without them."""
    engine = await AsyncEngine.start(config)
    async with held(engine):
        task = await start_collecting(engine, request("a", LONG))
        look_for(int(async_engine.STALLED_S), engine, clock)
        with pytest.raises(EngineDeadError, match="no progress for 5 s"):
            look_for(1, engine, clock)
        engine.drop("a")
        task.cancel()
        with pytest.raises(EngineDeadError, match="no progress"):
            engine.check_health()
        with pytest.raises(EngineDeadError, match="no progress"):
            await collect(engine, request("b"))
    await until_async(lambda: is_healthy(engine))
    assert len(await collect(engine, request("c"))) == 8
    await engine.stop()


async def test_a_process_that_was_suspended_is_healthy(config: EngineConfig, clock: Clock) -> None:
    """The event loop goes on before the engine's thread does."""
    engine = await AsyncEngine.start(config)
    async with held(engine):
        look_for(1, engine, clock)
        clock.now_s += 3600.0
        look_for(1, engine, clock)
    await engine.stop()


async def test_an_idle_engine_is_healthy(config: EngineConfig, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "IDLE_POLL_S", 0.01)
    engine = await AsyncEngine.start(config)
    for _ in range(2 * int(async_engine.STALLED_S)):
        look_for(1, engine, clock)
        await until_async(lambda: engine._last_step_s == clock.now_s)
    await engine.stop()


async def test_stopping_a_wedged_engine_leaves_its_thread_and_ends_its_streams(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_engine, "STOP_TIMEOUT_S", 0.1)
    engine = await AsyncEngine.start(config)
    async with held(engine):
        task = await start_collecting(engine, request("a", LONG))
        await engine.stop()
        with pytest.raises(EngineDeadError, match="stopping"):
            await task


async def test_start_reports_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        await AsyncEngine.start(EngineConfig(ModelConfig(str(tmp_path))))
    write_config(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        await AsyncEngine.start(EngineConfig(ModelConfig(str(tmp_path / "tiny"))))
