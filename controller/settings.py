"""What outlives a controller: its epoch, the setting in force of each model, and the operator's policies, in Redis.

Keys share one hash tag, so that a Redis cluster keeps them in one slot and one transaction can write them all:

    {<prefix>:controller}:epoch      number of the newest controller life
    {<prefix>:controller}:settings   model_id |-> Setting as JSON
    {<prefix>:controller}:policies   model_id, or "*" for all others, |-> Policy as JSON
    {<prefix>:controller}:decisions  the ledger's stream

Each save writes everything, so a Redis that came back empty is whole again after one save. A controller whose epoch is
no longer the newest writes nothing: an old life on a cut-off node cannot undo what the new one decided.
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
from redis.exceptions import WatchError

from controller.ledger import DecisionLedger
from controller.model_control import Policy
from controller.types import Setting

log = logging.getLogger(__name__)

ALL_MODELS = "*"
TIMEOUT_S = 1.0

_SETTING = TypeAdapter(Setting)
_POLICY = TypeAdapter(Policy)


class SupersededError(RuntimeError):
    """A newer life of the controller has claimed the epoch; this one must not write."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What an earlier life left. Entries that cannot be read are dropped."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)


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
        tag = f"{{{key_prefix}:controller}}"
        self._epoch_key = f"{tag}:epoch"
        self._settings_key = f"{tag}:settings"
        self._policies_key = f"{tag}:policies"
        self._decisions_key = f"{tag}:decisions"

    async def claim_epoch(self, above: int) -> int:
        """Begin a new life: an epoch greater than every stored one and than ``above``."""
        epoch = int(await self._redis.incr(self._epoch_key))
        if epoch <= above:
            epoch = above + 1
            await self._redis.set(self._epoch_key, epoch)
        return epoch

    async def load(self, ledger: DecisionLedger) -> Saved:
        """What earlier lives saved; their newest decisions go into ``ledger``."""
        settings = await cast(Any, self._redis.hgetall(self._settings_key))
        policies = await cast(Any, self._redis.hgetall(self._policies_key))
        rows = await cast(Any, self._redis.xrevrange(self._decisions_key, count=ledger.capacity))
        ledger.restore(fields["row"] for _, fields in reversed(rows))
        return Saved(_parsed(_SETTING, settings), _parsed(_POLICY, policies))

    async def save(
        self, epoch: int, settings: Mapping[str, Setting], policies: Mapping[str, Policy], ledger: DecisionLedger
    ) -> None:
        """Write all in one transaction; SupersededError if a newer life exists."""
        rows = ledger.unsaved()
        async with self._redis.pipeline(transaction=True) as transaction:
            await transaction.watch(self._epoch_key)
            newest = int(await transaction.get(self._epoch_key) or 0)
            if newest > epoch:
                raise SupersededError(f"epoch {newest} has been claimed, ours is {epoch}")
            transaction.multi()
            transaction.set(self._epoch_key, epoch)
            _write_hash(transaction, self._settings_key, {k: _SETTING.dump_json(v) for k, v in settings.items()})
            _write_hash(transaction, self._policies_key, {k: _POLICY.dump_json(v) for k, v in policies.items()})
            for row in rows:
                transaction.xadd(self._decisions_key, {"row": row}, maxlen=ledger.capacity, approximate=True)
            try:
                await transaction.execute()
            except WatchError as error:
                raise SupersededError("another controller wrote the epoch at the same time") from error
        ledger.mark_saved(len(rows))

    async def close(self) -> None:
        await self._redis.aclose()


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
