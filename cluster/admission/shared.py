"""Token buckets in Redis, shared by all ingress processes: a script takes from both buckets of a tenant or from none.

    <prefix>:rate:{<tenant>}    a hash: levels of both buckets, and when they were right; gone once they would be full

All takes of a moment go out in one pipeline on one connection, sent in the background: a request awaits its answer for
at most LIMIT_S, and a request that gives up costs the connection nothing. Without answers, or with late ones, the
buckets are not `reachable` until a round trip within LIMIT_S shows that they are again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from enum import Enum

from cluster.admission.buckets import Grant, Levels, RateKind, Rates
from cluster.router.loads import connect, end

LIMIT_S = 0.005  # the most that a request waits for Redis
OPEN_AFTER_LATE = 3  # late answers in a row; a lost connection opens the breaker at once
PROBE_PERIOD_S = 0.25
NO_LIMIT = -1  # for the script

logger = logging.getLogger(__name__)

# KEYS[1]: the hash. ARGV: both rates per minute, what to take of both, whether to take it come what may.
SCRIPT = """
local function refilled(stored, per_minute, elapsed_s)
  if per_minute < 0 then return 0 end
  return math.min(per_minute, (tonumber(stored) or per_minute) + elapsed_s * per_minute / 60)
end
local time = redis.call('TIME')
local now_s = tonumber(time[1]) + tonumber(time[2]) / 1e6
local stored = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at_s')
local elapsed_s = math.max(0, now_s - (tonumber(stored[3]) or now_s))
local rate = {tonumber(ARGV[1]), tonumber(ARGV[2])}
local wanted = {tonumber(ARGV[3]), tonumber(ARGV[4])}
local level = {refilled(stored[1], rate[1], elapsed_s), refilled(stored[2], rate[2], elapsed_s)}
local short = 0
if ARGV[5] ~= '1' then
  for i = 2, 1, -1 do
    if rate[i] >= 0 and level[i] < wanted[i] then short = i end
  end
end
if short == 0 then
  local full_s = 0
  for i = 1, 2 do
    if rate[i] >= 0 then
      level[i] = math.min(rate[i], level[i] - wanted[i])
      full_s = math.max(full_s, (rate[i] - level[i]) / rate[i] * 60)
    end
  end
  redis.call('HSET', KEYS[1], 'requests', string.format('%.6f', level[1]), 'tokens', string.format('%.6f', level[2]),
             'at_s', string.format('%.6f', now_s))
  redis.call('PEXPIRE', KEYS[1], math.ceil(full_s * 1000) + 1000)
end
return {short, string.format('%.6f', level[1]), string.format('%.6f', level[2])}
"""


@dataclass(frozen=True, slots=True)
class _Take:
    tenant: str
    rates: Rates
    num_requests: float
    num_tokens: float
    force: bool
    answer: asyncio.Future[Grant] | None  # None: nobody waits for it


class Missed(Enum):
    """Why there is no answer."""

    AWAY = "away"  # Redis was not asked, or has lost it
    LATE = "late"  # it was asked, and will do it


class SharedBuckets:
    """All methods belong to one event loop."""

    def __init__(self, redis_url: str, key_prefix: str) -> None:
        self._client = connect(redis_url)
        self._key_prefix = key_prefix
        self._pending: list[_Take] = []
        self._has_pending = asyncio.Event()
        self._num_late = 0
        self._task: asyncio.Task[None] | None = None
        self.reachable = False  # until the first round trip

    def start(self) -> None:
        """Begin to exchange; later calls do nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="shared-rates")

    async def take(self, tenant: str, rates: Rates, num_requests: float, num_tokens: float) -> Grant | Missed:
        """After at most LIMIT_S."""
        self.start()
        if not self.reachable:
            return Missed.AWAY
        answer: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
        self._send(_Take(tenant, rates, num_requests, num_tokens, False, answer))
        try:
            async with asyncio.timeout(LIMIT_S):
                grant = await answer
        except TimeoutError:
            self._num_late += 1
            if self._num_late >= OPEN_AFTER_LATE:
                self._note(reachable=False, why="it answers too late")
            return Missed.LATE
        except Exception:  # what the exchange ended with
            return Missed.AWAY
        self._num_late = 0
        return grant

    def settle(self, tenant: str, rates: Rates, num_requests: float, num_tokens: float) -> None:
        """Take what has been used already, or give back (negative) what was not; in the background."""
        if self.reachable:
            self._send(_Take(tenant, rates, num_requests, num_tokens, True, None))

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)
        await self._client.aclose()

    def _send(self, take: _Take) -> None:
        self._pending.append(take)
        self._has_pending.set()

    async def _run(self) -> None:
        while True:
            self._has_pending.clear()
            takes, self._pending = self._pending, []
            sent_s = time.monotonic()
            try:
                await self._exchange(takes)
            except Exception as error:  # whatever a lost connection makes the client raise
                for take in takes:
                    if take.answer is not None and not take.answer.done():
                        take.answer.set_exception(error)
                self._note(reachable=False, why=str(error))
            else:
                if not self.reachable and time.monotonic() - sent_s <= LIMIT_S:
                    self._num_late = 0
                    self._note(reachable=True)
            if not self.reachable:
                await asyncio.sleep(PROBE_PERIOD_S)
            elif not self._pending:
                await self._has_pending.wait()

    async def _exchange(self, takes: list[_Take]) -> None:
        """One round trip; a ping if there is nothing to take."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.ping()
            for take in takes:
                requests, tokens = take.rates.requests, take.rates.tokens
                pipeline.eval(
                    SCRIPT,
                    1,
                    rate_key(self._key_prefix, take.tenant),
                    NO_LIMIT if requests is None else requests,
                    NO_LIMIT if tokens is None else tokens,
                    take.num_requests,
                    take.num_tokens,
                    int(take.force),
                )
            _, *answers = await pipeline.execute()
        for take, (short, requests_left, tokens_left) in zip(takes, answers, strict=True):
            if take.answer is not None and not take.answer.done():
                kind = (None, RateKind.REQUESTS, RateKind.TOKENS)[int(short)]
                take.answer.set_result(Grant(Levels(float(requests_left), float(tokens_left)), kind))

    def _note(self, *, reachable: bool, why: str = "") -> None:
        """Log changes only."""
        if reachable != self.reachable:
            self.reachable = reachable
            if reachable:
                logger.info("rates are shared through redis")
            else:
                logger.warning("redis cannot share rates (%s); this ingress goes by its part of them", why)


def rate_key(key_prefix: str, tenant: str) -> str:
    """One key of one slot each: the script runs on a Redis Cluster too."""
    return f"{key_prefix}:rate:{{{tenant}}}"
