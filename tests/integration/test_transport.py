"""Requests over a real channel to a real engine: tokens, refusals, and every way in which an end may go away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from cluster.transport.channel import ReplicaChannel, ReplicaLostError
from cluster.transport.messages import METHOD, DrainingError
from cluster.transport.server import ChannelServer
from engine.async_engine import AsyncEngine, Deliver
from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.types import (
    EngineBusyError,
    EngineDeadError,
    GenerationRequest,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
)
from tests.models import write_config
from tests.waiting import until_async

TOKEN = "secret"
HOST = "127.0.0.1"
LONG = 400


def request(request_id: str, max_tokens: int = 8, prompt: tuple[int, ...] = (1, 2, 3)) -> GenerationRequest:
    return GenerationRequest(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True))


async def collect(source: ReplicaChannel | AsyncEngine, request: GenerationRequest) -> list[int]:
    return [token async for output in source.generate(request) for token in output.token_ids]


class HeldEngine(AsyncEngine):
    """Real in all but one thing: the last output of a LONG request comes when it may. On a busy machine such a request
    would else have ended, once the test gets round to what it does meanwhile.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._may_end = False
        self._held: list[tuple[Deliver, RequestOutput]] = []

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        def hold(item: RequestOutput | Exception) -> None:
            if isinstance(item, RequestOutput) and item.finished and not self._may_end:
                self._held.append((deliver, item))
            else:
                deliver(item)

        super().submit(request, hold if request.sampling.max_tokens == LONG else deliver)

    def let_end(self) -> None:
        self._may_end = True
        for deliver, item in self._held:
            deliver(item)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends of a channel are alive, however long they do not answer."""
    monkeypatch.setattr("cluster.transport.channel.CONNECT_TIMEOUT_S", 60.0)
    monkeypatch.setattr("cluster.transport.channel.PING_TIMEOUT_MS", 60_000)
    monkeypatch.setattr("cluster.transport.server.WRITE_TIMEOUT_S", 60.0)


@pytest_asyncio.fixture
async def engine(tmp_path: Path, patient: None) -> AsyncIterator[HeldEngine]:
    path = write_config(tmp_path / "tiny")
    scheduler = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_num_waiting=60)
    engine = await HeldEngine.start(EngineConfig(ModelConfig(str(path), load_format="random"), scheduler=scheduler))
    assert isinstance(engine, HeldEngine)
    yield engine
    await engine.stop()


@pytest_asyncio.fixture
async def server(engine: AsyncEngine) -> AsyncIterator[ChannelServer]:
    server = ChannelServer(engine, TOKEN)
    server.address = await server.start(HOST)
    yield server
    await server.stop()


class Ingress:
    """One end of a channel, and what it was told."""

    def __init__(self) -> None:
        self.lost: list[ReplicaChannel] = []
        self.channel: ReplicaChannel

    async def open(self, address: str, token: str = TOKEN) -> Ingress:
        self.channel = await ReplicaChannel.open("r", address, token, self.lost.append)
        return self


@pytest_asyncio.fixture
async def ingress(server: ChannelServer) -> AsyncIterator[Ingress]:
    ingress = await Ingress().open(server.address)
    yield ingress
    await ingress.channel.close()


async def test_every_stream_gets_what_the_engine_gives(engine: AsyncEngine, ingress: Ingress) -> None:
    prompts = [(i + 1, 2 * i + 2, 7) for i in range(40)]
    alone = [await collect(engine, request(f"alone{i}", prompt=p)) for i, p in enumerate(prompts)]
    through = await asyncio.gather(
        *(collect(ingress.channel, request(f"t{i}", prompt=p)) for i, p in enumerate(prompts))
    )
    assert through == alone


async def test_a_proxy_for_the_world_outside_is_not_asked(
    server: ChannelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    ingress = await Ingress().open(server.address)
    assert len(await collect(ingress.channel, request("a"))) == 8
    await ingress.channel.close()


async def test_the_last_output_is_as_the_engine_made_it(engine: AsyncEngine, ingress: Ingress) -> None:
    (*_, expected) = [output async for output in engine.generate(request("a"))]
    (*_, last) = [output async for output in ingress.channel.generate(request("a"))]
    assert last.usage is not None
    assert (last.finish_reason, last.usage.completion_tokens) == (expected.finish_reason, 8)


async def test_a_closed_stream_ends_in_the_engine(engine: AsyncEngine, server: ChannelServer, ingress: Ingress) -> None:
    async with aclosing(ingress.channel.generate(request("a", LONG))) as outputs:
        await anext(outputs)
        assert server.num_open == 1
    await until_async(lambda: not server.num_open)
    await collect(engine, request("b"))  # the abort was queued before
    assert engine.stats().num_running == 0
    assert engine.stats().kv_used_frac == 0


async def test_refusals_arrive_as_they_are(ingress: Ingress) -> None:
    with pytest.raises(InvalidRequestError) as invalid:
        await collect(ingress.channel, request("a", prompt=(10**6,)))
    assert invalid.value.param == "prompt"
    outcomes = await asyncio.gather(
        *(collect(ingress.channel, request(f"r{i}", 30)) for i in range(160)), return_exceptions=True
    )
    busy = [outcome for outcome in outcomes if isinstance(outcome, EngineBusyError)]
    assert busy
    assert busy[0].retry_after_s > 0
    assert all(isinstance(outcome, EngineBusyError) or len(outcome) == 30 for outcome in outcomes)


async def test_an_ingress_that_goes_away_leaves_nothing_behind(engine: AsyncEngine, server: ChannelServer) -> None:
    ingress = await Ingress().open(server.address)
    outputs = [ingress.channel.generate(request(f"r{i}", LONG)) for i in range(3)]
    for stream in outputs:
        await anext(stream)
    await ingress.channel.close()
    for stream in outputs:
        with pytest.raises(ReplicaLostError):
            async for _ in stream:
                pass
    assert ingress.lost == []  # it closed the channel itself
    await until_async(lambda: not server.num_open)
    await collect(engine, request("b"))
    assert engine.stats().num_running == 0


async def test_a_replica_that_goes_away_ends_its_requests(server: ChannelServer, ingress: Ingress) -> None:
    outputs = ingress.channel.generate(request("a", LONG))
    await anext(outputs)
    await server.stop()
    with pytest.raises(ReplicaLostError):
        async for _ in outputs:
            pass
    assert ingress.lost == [ingress.channel]
    with pytest.raises(ReplicaLostError):
        await collect(ingress.channel, request("b"))


async def test_a_wedged_engine_ends_its_requests(
    engine: AsyncEngine, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wedged() -> None:
        raise EngineDeadError("no progress")

    outputs = ingress.channel.generate(request("a", LONG))
    await anext(outputs)
    monkeypatch.setattr(engine, "check_health", wedged)
    with pytest.raises(ReplicaLostError, match="no progress"):
        async for _ in outputs:
            pass
    with pytest.raises(ReplicaLostError, match="no progress"):
        await collect(ingress.channel, request("b"))


async def test_draining_finishes_what_runs_and_refuses_the_rest(
    engine: HeldEngine, server: ChannelServer, ingress: Ingress
) -> None:
    outputs = ingress.channel.generate(request("a", LONG))
    await anext(outputs)
    drained = asyncio.create_task(server.drain(600))
    await asyncio.sleep(0)
    with pytest.raises(DrainingError):
        await collect(ingress.channel, request("b"))
    assert not drained.done()
    engine.let_end()
    *_, last = [output async for output in outputs]
    assert last.usage.completion_tokens == LONG
    await drained


async def test_a_channel_needs_the_token(engine: AsyncEngine, server: ChannelServer) -> None:
    ingress = await Ingress().open(server.address, "wrong")
    with pytest.raises(ReplicaLostError):
        await collect(ingress.channel, request("a"))
    await until_async(lambda: ingress.lost)
    await ingress.channel.close()


async def test_an_unreachable_replica_is_lost() -> None:
    with pytest.raises(ReplicaLostError, match="cannot be reached"):
        await Ingress().open("127.0.0.1:1")


async def test_nonsense_ends_only_its_own_channel(server: ChannelServer, ingress: Ingress) -> None:
    async with grpc.aio.insecure_channel(server.address) as raw:
        call = raw.stream_stream(METHOD)(metadata=(("brownoutserve-token", TOKEN),))
        await call.write(b"\xc1 nonsense")
        assert await call.read() is grpc.aio.EOF
    assert len(await collect(ingress.channel, request("a"))) == 8
