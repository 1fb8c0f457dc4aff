"""API keys end to end but for Ray: the CLI makes them, a file or a real Redis keeps them, the API asks for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
import yaml
from click.testing import CliRunner

from cluster.admission.config import AdmissionSection
from cluster.admission.key_store import FileKeyStore, KeyStore, RedisKeyStore
from cluster.admission.key_watch import KeyWatch
from cluster.admission.keys import KeyFault, new_key
from cluster.admission.tenants import TenantLimits
from cluster.cli import main
from cluster.ingress.auth import Authenticator
from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.local.redis_server import RedisServer
from engine.async_engine import AsyncEngine
from engine.types import ServiceClass
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.served_api import engine_config
from tests.models import write_config
from tests.waiting import until_async

ADMIN = "the-admin-token"
COMPLETION: dict[str, Any] = {"model": "small", "prompt": "Once", "max_tokens": 2, "temperature": 0}
TENANTS = {
    "acme": TenantLimits(service_class=ServiceClass.FULL),
    "free": TenantLimits(models=("small",), may_ask_full=False),
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["file", "redis"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> KeyStore:
    monkeypatch.setattr("cluster.admission.key_store.TIMEOUT_S", 60.0)  # no answer comes too late
    return FileKeyStore(tmp_path / "keys.json") if request.param == "file" else RedisKeyStore(redis.url, tmp_path.name)


def test_a_store_keeps_what_it_is_given(store: KeyStore) -> None:
    assert store.load() is None
    records = [new_key("acme", float(number))[1] for number in range(3)]
    for record in reversed(records):
        store.add(record)
    assert store.load() == records
    assert store.remove(records[1].key_id)
    assert not store.remove(records[1].key_id)
    assert store.load() == [records[0], records[2]]


def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    FileKeyStore(tmp_path / "keys.json").add(new_key("acme", 0.0)[1])
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0


async def test_changes_reach_the_watch_and_a_lost_store_locks_nobody_out(store: KeyStore, redis: RedisServer) -> None:
    watch = KeyWatch([store], poll_s=0.01)
    assert (watch.is_ready, len(watch.ring)) == (True, 0)
    watch.watch()
    key, record = new_key("acme", 0.0)
    store.add(record)
    await until_async(lambda: len(watch.ring) == 1)
    if isinstance(store, RedisKeyStore):
        store._client.flushall()
    else:
        assert isinstance(store, FileKeyStore)
        store._path.unlink()
    await asyncio.sleep(0.1)
    assert watch.ring.find(key, 1.0) == record
    store.add(record)
    store.remove(record.key_id)
    await until_async(lambda: watch.ring.find(key, 1.0) is KeyFault.UNKNOWN)
    await watch.close()


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    serve_file = tmp_path / "serve.yaml"
    args = {"model": {"path": "m"}, "admission": {"keys_file": str(tmp_path / "keys.json")}}
    application = {"name": "app", "import_path": "cluster.app:build", "args": args}
    serve_file.write_text(yaml.safe_dump({"applications": [application]}))

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["keys", words[0], str(serve_file), *words[1:]])
        return result.exit_code, result.stdout

    code, key = run("create", "--tenant", "acme", "--expires", "30d", "--label", "laptop")
    key = key.splitlines()[0]
    assert code == 0
    assert key not in (tmp_path / "keys.json").read_text()
    (record,) = FileKeyStore(tmp_path / "keys.json").load() or []
    assert record.expires_at_s == record.created_at_s + 30 * 86400
    assert record.key_id in run("list")[1]
    assert key.rsplit("_", 1)[1] not in run("list")[1]
    assert run("revoke", record.key_id)[0] == 0
    assert run("revoke", record.key_id)[0] == 1
    assert run("create", "--tenant", "a b")[0] == 2
    assert FileKeyStore(tmp_path / "keys.json").load() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(engine_config(write_config(tmp_path_factory.mktemp("models") / "small")))
    yield engine
    await engine.stop()


class Door:
    """An API that asks for keys, two models behind it, and a key of each tenant."""

    def __init__(self, engine: AsyncEngine, store: FileKeyStore) -> None:
        self.keys: dict[str, str] = {}
        for tenant in ("acme", "free", "stranger"):
            self.keys[tenant], record = new_key(tenant, 0.0)
            store.add(record)
        admission = AdmissionSection(tenants=TENANTS)
        models = [ServedModel(name, InProcessBackend(engine), engine.tokenizer) for name in ("small", "large")]
        auth = Authenticator(admission, KeyWatch([store], poll_s=0.01), ADMIN)
        api = create_api(OpenAIService(models, IngressSection(admin_token=ADMIN), "ingress", auth=auth))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test", timeout=60)

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=self.http, max_retries=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(engine: AsyncEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    door = Door(engine, FileKeyStore(tmp_path_factory.mktemp("keys") / "keys.json"))
    yield door
    await door.http.aclose()


@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_valid_key_nothing_is_served(door: Door) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert (await door.http.post(path, json=COMPLETION)).status_code == 401
    assert (await door.http.get("/v1/models")).status_code == 401
    assert (await door.http.get("/v1/models/small")).status_code == 401
    refusal = await door.http.post("/v1/completions", json=COMPLETION, headers={"authorization": "Bearer wrong"})
    assert refusal.headers["www-authenticate"] == "Bearer"
    error = {"message": "the API key is unknown", "type": "invalid_request_error", "param": None}
    assert refusal.json() == {"error": {**error, "code": "invalid_api_key"}}
    with pytest.raises(openai.AuthenticationError):
        await door.client(door.keys["acme"][:-1] + "_").completions.create(**COMPLETION)


@pytest.mark.asyncio(loop_scope="module")
async def test_what_machines_ask_stays_open_and_what_operators_ask_takes_their_token(door: Door) -> None:
    assert (await door.http.get("/health")).status_code == 200
    assert (await door.http.get("/ready")).status_code == 200
    for key in ("", door.keys["acme"], ADMIN):
        headers = {"authorization": f"Bearer {key}"}
        expected = 200 if key == ADMIN else 403
        assert (await door.http.get("/metrics", headers=headers)).status_code == expected
        status = (await door.http.get("/v1/brownout", headers=headers)).status_code
        assert status == (503 if key == ADMIN else 403)  # there is no controller here


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_sees_and_uses_its_models_only(door: Door) -> None:
    free, acme = door.client(door.keys["free"]), door.client(door.keys["acme"])
    assert [model.id for model in (await free.models.list()).data] == ["small"]
    assert [model.id for model in (await acme.models.list()).data] == ["small", "large"]
    assert (await free.completions.create(**COMPLETION)).usage.completion_tokens == 2
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await free.completions.create(**{**COMPLETION, "model": "large"})
    assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
    with pytest.raises(openai.NotFoundError) as unknown:
        await free.completions.create(**{**COMPLETION, "model": "other"})
    assert "large" not in str(unknown.value)


@pytest.mark.asyncio(loop_scope="module")
async def test_no_tenant_learns_from_the_cache_what_another_has_sent(door: Door) -> None:
    async def num_cached(tenant: str, **more: Any) -> int:
        prompt = {**COMPLETION, "prompt": list(range(5, 40))}
        answer = await door.client(door.keys[tenant]).completions.create(**prompt, extra_body=more)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert await num_cached("free") == 0
    assert await num_cached("free") == 32
    assert await num_cached("stranger") == 0
    assert await num_cached("free", cache_salt="a user's") == 0
    assert await num_cached("free", cache_salt="a user's") == 32


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_has_its_class_and_may_not_refuse_dimming_if_it_must_not(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for tenant, consent in (("acme", "full"), ("free", "standard"), ("stranger", "standard")):
        caplog.clear()
        await door.client(door.keys[tenant]).completions.create(**COMPLETION)
        (line,) = [record.fields for record in caplog.records if record.message == "request"]
        assert (line["tenant"], line["class"]) == (tenant, consent)
        assert door.keys[tenant] not in json.dumps(line)
    free = door.client(door.keys["free"])
    for refusing in ({"extra_headers": {"x-brownout-class": "full"}}, {"extra_body": {"brownout": {"max_loss": 0}}}):
        with pytest.raises(openai.PermissionDeniedError):
            await free.completions.create(**COMPLETION, **refusing)
    caplog.clear()
    consenting = {"x-brownout-class": "standard"}
    await door.client(door.keys["acme"]).completions.create(**COMPLETION, extra_headers=consenting)
    assert [record.fields["class"] for record in caplog.records if record.message == "request"] == ["standard"]
