"""A Redis that speaks TLS only and asks for a password: every part of the system that uses Redis works through it.

The server of the tests is built without TLS, so a terminator stands before it, as `stunnel` or a cloud's proxy would.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.crc import key_slot

from cluster.admission.key_store import RedisKeyStore
from cluster.admission.keys import new_key
from cluster.autoscaling import APP, PlannedReplicas
from cluster.local.processes import free_ports
from cluster.local.redis_server import RedisServer, RedisUnavailableError, resolve_redis
from cluster.router.loads import LoadPublisher
from cluster.router.policy import ReplicaLoad
from cluster.router.registry import LoadRegistry
from cluster.router.router import Router
from controller.planner import PlannerParams
from controller.settings import plan_key
from engine.types import GenerationRequest
from tests.certificates import certificate
from tests.integration.control_harness import CONFIG, Cluster, make_patient
from tests.waiting import TIMEOUT_S, until_async

HOST = "localhost"  # the name that the certificate is for
GROUP, PREFIX = "app:engines", "app"
REPLICAS = ("a", "b")
LOAD = ReplicaLoad(0, 0, 0, max_num_seqs=8, queued_prefill_tokens=0, max_num_batched_tokens=256, kv_used_frac=0.0)


class TlsTerminator:
    """Listens with TLS and passes the plain bytes on."""

    def __init__(self, target_port: int, context: ssl.SSLContext) -> None:
        self._target_port = target_port
        self._context = context
        (self._port,) = free_ports(1)
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}

    @property
    def port(self) -> int:
        return self._port

    async def start(self) -> None:
        """Again on the same port if it has been stopped."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=self._context)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        serving = [task for task in self._connections.values() if task is not None]
        for writer in self._connections:
            writer.transport.abort()
        await asyncio.gather(*serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._connections[writer] = asyncio.current_task()
        await asyncio.gather(_copy(reader, target_writer), _copy(target_reader, writer))
        del self._connections[writer]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer of Redis comes too late, however busy the machine is."""
    make_patient(monkeypatch)
    for module in ("cluster.admission.key_store", "cluster.router.loads"):
        monkeypatch.setattr(f"{module}.TIMEOUT_S", 60.0)
    monkeypatch.setattr("cluster.local.redis_server.CONNECT_TIMEOUT_S", 60.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest_asyncio.fixture
async def tls(server: RedisServer, tmp_path: Path) -> AsyncIterator[TlsTerminator]:
    authority = certificate("test authority")
    served = certificate(HOST, authority)
    for name, content in {"ca": authority.pem, "cert": served.pem, "key": served.key_pem}.items():
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    terminator = TlsTerminator(urlsplit(server.url).port or 0, context)
    await terminator.start()
    yield terminator
    await terminator.stop()


@pytest.fixture
def url(server: RedisServer, tls: TlsTerminator, tmp_path: Path) -> str:
    """As an operator writes it in REDIS_URL."""
    return f"rediss://:{urlsplit(server.url).password}@{HOST}:{tls.port}/0?ssl_ca_certs={tmp_path / 'ca'}"


async def routed(url: str, seconds: float = TIMEOUT_S) -> set[str]:
    """The replicas of which a router knows the load, once it knows any, or after a while."""
    publishers = [
        LoadPublisher(url, GROUP, name, lambda sequence: replace(LOAD, sequence=sequence)) for name in REPLICAS
    ]
    for publisher in publishers:
        publisher.start()
    registry = LoadRegistry(url, GROUP)
    router, deadline_s = Router(registry), time.monotonic() + seconds
    while not registry.loads() and time.monotonic() < deadline_s:
        assert router.pick(GenerationRequest("r", (1, 2)), dict.fromkeys(REPLICAS, 0)) in REPLICAS  # with Redis or not
        await asyncio.sleep(0.02)
    known = set(registry.loads())
    await registry.close()
    for publisher in publishers:
        await publisher.stop()
    return known


async def test_router_and_loads(url: str, tls: TlsTerminator) -> None:
    assert await routed(url)
    await tls.stop()
    assert not await routed(url, seconds=0.5)
    await tls.start()
    assert await routed(url)


async def test_settings_ledger_plan_and_keys(server: RedisServer, url: str) -> None:
    """What one controller saves another one finds; the planned number of replicas is read; a key is kept."""
    cluster = Cluster(server)
    try:
        planner = PlannerParams(min_replicas=1, max_replicas=3)
        service = await cluster.start_controller(replace(CONFIG, key_prefix=PREFIX, planner=planner), redis_url=url)
        replica = await cluster.start_replica("a")
        await until_async(lambda: replica.levels == (1, 1))
        await service.set_policy("static", 3)
        await until_async(lambda: replica.levels == (3, 3) and service.status()["redis_ok"])
        await until_async(lambda: service.decisions(50))
        epoch, model = service.status()["epoch"], service.status()["models"]["model"]
        client = Redis.from_url(url)
        async with asyncio.timeout(TIMEOUT_S):
            while await client.get(plan_key(PREFIX, "model")) is None:
                await asyncio.sleep(0.02)
        policy = PlannedReplicas(plan_key(APP, "model"), url)
        context = SimpleNamespace(app_name=PREFIX, target_num_replicas=0)
        await until_async(lambda: policy(context)[0] > 0)
        store, (_, record) = RedisKeyStore(url, PREFIX), new_key("acme", now_s=0.0)
        await asyncio.to_thread(store.add, record)
        assert await asyncio.to_thread(store.load) == [record]
        slots = {key.split(b"}")[0]: key_slot(key) for key in await client.keys()}
        assert all(tag.startswith(b"{app:") for tag in slots)  # one slot for each part, on a Redis Cluster too
        await client.aclose()
        await service.stop()
        cluster.services.remove(service)
        again = await cluster.start_controller(replace(CONFIG, key_prefix=PREFIX), redis_url=url)
        await until_async(lambda: again.status()["redis_ok"] and "model" in again.status()["models"])
        assert again.status()["epoch"] == epoch + 1
        assert again.status()["models"]["model"]["policy"] == model["policy"]
        assert again.decisions(50)
    finally:
        await cluster.stop()


def other_authority(url: str, directory: Path) -> str:
    path = directory / "other"
    path.write_bytes(certificate("test authority").pem)
    return f"{url.split('?')[0]}?ssl_ca_certs={path}"


WRONG = {
    "another authority": other_authority,
    "no authority": lambda url, _: url.split("?")[0],
    "another name": lambda url, _: url.replace(f"@{HOST}:", "@127.0.0.1:"),
    "no TLS": lambda url, _: url.replace("rediss://", "redis://").split("?")[0],
    "wrong password": lambda url, _: url.replace("rediss://:", "rediss://:x"),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_what_does_not_match_is_refused_in_one_sentence(
    url: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers then go by their own count, as with a Redis that is down."""
    bad = WRONG[wrong](url, tmp_path)
    assert not await routed(bad, seconds=0.4)
    monkeypatch.setenv("REDIS_URL", bad)
    with pytest.raises(RedisUnavailableError, match="does not answer") as caught:
        await asyncio.to_thread(resolve_redis(tmp_path).start)
    assert "\n" not in str(caught.value) and str(urlsplit(bad).password) not in str(caught.value)
    monkeypatch.setenv("REDIS_URL", url)
    await asyncio.to_thread(resolve_redis(tmp_path).start)
