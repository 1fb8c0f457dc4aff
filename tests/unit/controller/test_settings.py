"""What outlives a controller, against a real Redis: settings, policies, decisions and the epoch that orders lives."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.local.redis_server import RedisServer
from controller import settings
from controller.ledger import DecisionLedger
from controller.model_control import Policy
from controller.quality import QualityAccount
from controller.settings import ALL_MODELS, SettingsStore, SupersededError, ToSave
from controller.types import Decision, Observation, PhaseDecision, Reason, Setting
from tests.waiting import TIMEOUT_S

_prefixes = (f"test{i}" for i in itertools.count())


def setting(version: int, model_id: str = "model", epoch: int = 1) -> Setting:
    phase = PhaseDecision(floor=1, ceiling=3, budget_s=0.1, margin=0.92)
    return Setting(Decision(phase, phase, "aimd", Reason.SLO_VIOLATED), model_id, epoch, version, 2.0)


@pytest.fixture
async def new_store(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[[], SettingsStore]]:
    """Stores of one cluster, as successive lives of its controller would open them; none minds a busy machine."""
    monkeypatch.setattr(settings, "TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(settings, "PLAN_LIFE_S", TIMEOUT_S)
    prefix, stores = next(_prefixes), []

    def create() -> SettingsStore:
        stores.append(SettingsStore(redis_server.url, prefix))
        return stores[-1]

    yield create
    for store in stores:
        await store.close()


async def test_a_later_life_finds_everything(new_store: Callable[[], SettingsStore]) -> None:
    first = new_store()
    epoch = await first.claim_epoch(above=0)
    ledger = DecisionLedger()
    ledger.append(setting(3), Observation(num_replicas=2, ttft_p90_s=0.5), time_s=1000.0)
    policies = {ALL_MODELS: Policy("aimd", {"window_s": 3.0}), "model": Policy("static", {"level": 2})}
    await first.save(ToSave(epoch, 0.0, {"model": setting(3)}, policies), ledger)
    assert ledger.unsaved() == []

    second = new_store()
    assert await second.claim_epoch(above=0) == epoch + 1
    restored = DecisionLedger()
    saved = await second.load(restored, 0.0)
    assert saved.settings == {"model": setting(3)}
    assert saved.policies == policies
    assert restored.recent(10) == ledger.recent(10)
    assert restored.unsaved() == []
    row = restored.recent(1)[0]
    assert (row["version"], row["reason"], row["inputs"]["ttft_p90_s"]) == (3, "slo_violated", 0.5)


async def test_what_is_gone_is_not_restored(new_store: Callable[[], SettingsStore]) -> None:
    store = new_store()
    epoch = await store.claim_epoch(above=0)
    await store.save(ToSave(epoch, 0.0, {"model": setting(1)}, {"model": Policy("aimd")}), DecisionLedger())
    await store.save(ToSave(epoch, 0.0, {"model": setting(2)}, {}), DecisionLedger())
    saved = await store.load(DecisionLedger(), 0.0)
    assert saved.settings["model"].version == 2
    assert saved.policies == {}


async def test_an_epoch_goes_above_what_replicas_have_seen(new_store: Callable[[], SettingsStore]) -> None:
    store = new_store()
    assert await store.claim_epoch(above=41) == 42
    assert await store.claim_epoch(above=0) == 43


async def test_a_superseded_life_writes_nothing(new_store: Callable[[], SettingsStore]) -> None:
    old, new = new_store(), new_store()
    old_epoch = await old.claim_epoch(above=0)
    new_epoch = await new.claim_epoch(above=0)
    await new.save(ToSave(new_epoch, 0.0, {"model": setting(7)}, {}), DecisionLedger())
    with pytest.raises(SupersededError):
        await old.save(ToSave(old_epoch, 0.0, {"model": setting(5)}, {}), DecisionLedger())
    assert (await new.load(DecisionLedger(), 0.0)).settings["model"].version == 7


async def test_unreadable_entries_are_dropped(
    new_store: Callable[[], SettingsStore], redis_server: RedisServer
) -> None:
    store = new_store()
    epoch = await store.claim_epoch(above=0)
    await store.save(ToSave(epoch, 0.0, {"good": setting(1, "good")}, {}), DecisionLedger())
    async with Redis.from_url(redis_server.url) as client:
        await client.hset(store._settings_key, "bad", "{not json")  # type: ignore[misc]
        await client.hset(store._settings_key, "worse", '{"version": "one"}')  # type: ignore[misc]
    assert set((await store.load(DecisionLedger(), 0.0)).settings) == {"good"}


async def test_all_keys_share_one_hash_slot(new_store: Callable[[], SettingsStore], redis_server: RedisServer) -> None:
    store = new_store()
    ledger = DecisionLedger()
    ledger.append(setting(1), Observation(), 0.0)
    state = ToSave(
        await store.claim_epoch(0),
        0.0,
        {"model": setting(1)},
        {ALL_MODELS: Policy("aimd")},
        {"model": {"standard": QualityAccount().spend(1.0, 0.0)}},
        {"model": "{}"},
    )
    await store.save(state, ledger)
    async with Redis.from_url(redis_server.url) as client:
        tag = store._epoch_key[: store._epoch_key.index("}") + 1]
        assert tag.startswith("{")
        assert len([key async for key in client.scan_iter(f"{tag}*")]) == 6


async def test_redis_away_is_a_redis_error() -> None:
    store = SettingsStore("redis://127.0.0.1:1/0", "away")
    with pytest.raises(RedisError):
        await store.claim_epoch(0)
    await store.close()


async def test_lost_minutes_keep_their_age_whatever_the_controllers_clocks_say(
    new_store: Callable[[], SettingsStore],
) -> None:
    store = new_store()
    account = QualityAccount().spend(3.0, now_s=1000.0)
    state = ToSave(await store.claim_epoch(0), 1500.0, accounts={"model": {"standard": account}})
    await store.save(state, DecisionLedger())
    saved = await store.load(DecisionLedger(), now_s=7.0)  # a controller on another host, just started
    ((start_s, lost),) = saved.accounts["model"]["standard"].minutes
    assert lost == 3.0
    assert start_s == pytest.approx(
        7.0 - 500.0, abs=TIMEOUT_S
    )  # what passes meanwhile is added; clocks are 1493 s apart
