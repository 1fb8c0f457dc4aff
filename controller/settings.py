"""What outlives a controller: its epoch, the setting in force of each model, and the operator's policies, in Redis.

Keys share one hash tag, so that a Redis cluster keeps them in one slot and one transaction can write them all:

    {<prefix>:controller}:epoch      number of the newest controller life
    {<prefix>:controller}:settings   model_id |-> Setting as JSON
    {<prefix>:controller}:policies   model_id, or "*" for all others, |-> Policy as JSON
    {<prefix>:controller}:quality    model_id |-> what each class lost in the last hour, as JSON
    {<prefix>:controller}:decisions  the ledger's stream
    {<prefix>:controller}:plan:<model_id>  how many replicas there should be, as JSON; expires when nobody plans
    {<prefix>:controller}:promise:<model_id>  what the arbiter saw last, as JSON, for whoever sheds; expires soon

Each save writes everything, so a Redis that came back empty is whole again after one save. A controller whose epoch is
no longer the newest writes nothing: an old life on a cut-off node cannot undo what the new one decided.

Hosts' clocks may differ, so what must be compared over lives, the age of a lost minute, is saved as an age together
with Redis' own time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from controller.ledger import DecisionLedger
from controller.model_control import Policy
from controller.quality import QualityAccount
from controller.types import Setting

log = logging.getLogger(__name__)

ALL_MODELS = "*"
TIMEOUT_S = 1.0
PLAN_LIFE_S = 10.0
PROMISE_LIFE_S = 5.0  # it is written once a second

_SETTING = TypeAdapter(Setting)
_POLICY = TypeAdapter(Policy)


@dataclass(frozen=True, slots=True)
class _SavedAccounts:
    """``accounts``: class |-> (age in seconds at ``redis_time_s``, nats * seconds) of each minute."""

    redis_time_s: float
    accounts: dict[str, tuple[tuple[float, float], ...]]


_ACCOUNTS = TypeAdapter(_SavedAccounts)


class SupersededError(RuntimeError):
    """A newer life of the controller has claimed the epoch; this one must not write."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What an earlier life left. Entries that cannot be read are dropped."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    accounts: Mapping[str, Mapping[str, QualityAccount]] = field(default_factory=dict)  # model_id |-> class |-> it


@dataclass(frozen=True, slots=True)
class ToSave:
    """All that outlives a controller; accounts are on the clock that says ``now_s``."""

    epoch: int
    now_s: float
    settings: Mapping[str, Setting] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    accounts: Mapping[str, Mapping[str, QualityAccount]] = field(default_factory=dict)
    plans: Mapping[str, str] = field(default_factory=dict)  # model_id |-> JSON
    promises: Mapping[str, str] = field(default_factory=dict)  # model_id |-> JSON


class SettingsStore:
    """Reads and writes the controller's state; every method raises redis.RedisError or OSError while Redis is away."""

    def __init__(self, redis_url: str, key_prefix: str) -> None:
        self._redis = Redis.from_url(
            redis_url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
        tag = controller_key(key_prefix)
        self._epoch_key = f"{tag}:epoch"
        self._settings_key = f"{tag}:settings"
        self._policies_key = f"{tag}:policies"
        self._quality_key = f"{tag}:quality"
        self._decisions_key = f"{tag}:decisions"
        self._key_prefix = key_prefix

    async def claim_epoch(self, above: int) -> int:
        """Begin a new life: an epoch greater than every stored one and than ``above``."""
        epoch = int(await self._redis.incr(self._epoch_key))
        if epoch <= above:
            epoch = above + 1
            await self._redis.set(self._epoch_key, epoch)
        return epoch

    async def newest_epoch(self) -> int:
        """Of the newest life that claimed one; 0: none did."""
        return int(await self._redis.get(self._epoch_key) or 0)

    async def load(self, ledger: DecisionLedger, now_s: float) -> Saved:
        """What earlier lives saved; their newest decisions go into ``ledger``. Accounts are put on our clock."""
        settings = await cast(Any, self._redis.hgetall(self._settings_key))
        policies = await cast(Any, self._redis.hgetall(self._policies_key))
        rows = await cast(Any, self._redis.xrevrange(self._decisions_key, count=ledger.capacity))
        # A row is there twice if the answer to its first save was lost.
        ledger.restore(dict.fromkeys(fields["row"] for _, fields in reversed(rows)))
        raw = await cast(Any, self._redis.hgetall(self._quality_key))
        redis_time_s = await self._time_s()
        accounts = {
            model_id: _with_ages(saved.accounts, now_s - (redis_time_s - saved.redis_time_s))
            for model_id, saved in _parsed(_ACCOUNTS, raw).items()
        }
        return Saved(_parsed(_SETTING, settings), _parsed(_POLICY, policies), accounts)

    async def save(self, state: ToSave, ledger: DecisionLedger) -> None:
        """Write all in one transaction; SupersededError if a newer life exists."""
        rows, epoch = ledger.unsaved(), state.epoch
        redis_time_s = await self._time_s()
        async with self._redis.pipeline(transaction=True) as transaction:
            await transaction.watch(self._epoch_key)
            newest = int(await transaction.get(self._epoch_key) or 0)
            if newest > epoch:
                raise SupersededError(f"epoch {newest} has been claimed, ours is {epoch}")
            transaction.multi()
            transaction.set(self._epoch_key, epoch)
            _write_hash(transaction, self._settings_key, {k: _SETTING.dump_json(v) for k, v in state.settings.items()})
            _write_hash(transaction, self._policies_key, {k: _POLICY.dump_json(v) for k, v in state.policies.items()})
            accounts = {
                model_id: _ACCOUNTS.dump_json(_SavedAccounts(redis_time_s, _ages(of_model, state.now_s)))
                for model_id, of_model in state.accounts.items()
            }
            _write_hash(transaction, self._quality_key, accounts)
            for model_id, plan in state.plans.items():
                transaction.set(plan_key(self._key_prefix, model_id), plan, px=int(PLAN_LIFE_S * 1000))
            for model_id, promise in state.promises.items():
                key = promise_key(self._key_prefix, model_id)
                transaction.set(key, promise, px=int(PROMISE_LIFE_S * 1000))
            for row in rows:
                transaction.xadd(self._decisions_key, {"row": row}, maxlen=ledger.capacity, approximate=True)
            await transaction.execute()  # WatchError if another life claims now; the next save finds it
        ledger.mark_saved(len(rows))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _time_s(self) -> float:
        seconds, microseconds = await cast(Any, self._redis.time())
        return float(seconds + microseconds / 1e6)


def controller_key(key_prefix: str) -> str:
    """What all keys of a controller begin with."""
    return f"{{{key_prefix}:controller}}"


def plan_key(key_prefix: str, model_id: str) -> str:
    return f"{controller_key(key_prefix)}:plan:{model_id}"


def promise_key(key_prefix: str, model_id: str) -> str:
    return f"{controller_key(key_prefix)}:promise:{model_id}"


def _ages(accounts: Mapping[str, QualityAccount], now_s: float) -> dict[str, tuple[tuple[float, float], ...]]:
    return {
        service_class: tuple((now_s - start_s, lost) for start_s, lost in account.minutes)
        for service_class, account in accounts.items()
    }


def _with_ages(ages: Mapping[str, tuple[tuple[float, float], ...]], saved_at_s: float) -> dict[str, QualityAccount]:
    """The inverse of `_ages`; ``saved_at_s``: on the clock that the accounts shall be on."""
    return {
        service_class: QualityAccount(tuple((saved_at_s - age_s, lost) for age_s, lost in minutes))
        for service_class, minutes in ages.items()
    }


def _write_hash(transaction: Pipeline, key: str, values: Mapping[str, bytes]) -> None:
    transaction.delete(key)
    if values:
        transaction.hset(key, mapping=cast(Any, values))


Parsed = TypeVar("Parsed")


def _parsed(adapter: TypeAdapter[Parsed], raw: Mapping[str, str]) -> dict[str, Parsed]:
    parsed: dict[str, Parsed] = {}
    for model_id, text in raw.items():
        try:
            parsed[model_id] = adapter.validate_json(text)
        except ValidationError as error:
            log.warning("dropped what was saved for model %r: %s", model_id, error)
    return parsed
