"""A streaming client of ``/v1/completions`` that turns each request into a RequestRecord.

aiohttp because the client shares its cores with the servers it measures. Every request has its own connection:
clients of a service do not share one, and a kept connection that the server closes is an error of the client's making.
"""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Any

import aiohttp

from benchmarks.loadgen.record import Clock, Outcome, RequestRecord
from benchmarks.loadgen.sse import SseParser
from benchmarks.workloads.workload import Arrival
from engine.types import BrownoutUsage

BUSY_STATUSES = (429, 503)
MAX_ERROR_CHARS = 300


def completion_body(model: str, arrival: Arrival) -> dict[str, Any]:
    """Of a streamed greedy completion of exactly ``arrival.max_tokens`` tokens; the last event holds the usage."""
    return {
        "model": model,
        "prompt": arrival.prompt_ids,
        "max_tokens": arrival.max_tokens,
        "seed": arrival.seed,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class CompletionClient:
    """Sends greedy requests of a fixed length; each one ends within ``timeout_s``. Use as ``async with``."""

    def __init__(self, base_url: str, model: str, timeout_s: float, api_key: str = "") -> None:
        self._url = f"{base_url.rstrip('/')}/v1/completions"
        self._model = model
        self._timeout_s = timeout_s
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> CompletionClient:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, arrival: Arrival, clock: Clock) -> RequestRecord:
        """Runs one request to its end, whatever that is; ``arrival.at_s`` is when it was due by ``clock``."""
        stream = _Stream(arrival.at_s, clock())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(arrival, stream, clock)
        except TimeoutError:
            stream.fail(Outcome.TIMEOUT, f"no end within {self._timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            stream.fail(Outcome.DISCONNECTED, repr(error))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            stream.fail(Outcome.MALFORMED, repr(error))
        return stream.record()

    async def _exchange(self, arrival: Arrival, stream: _Stream, clock: Clock) -> None:
        assert self._session is not None, "use the client as an async context manager"
        parser = SseParser()
        body = completion_body(self._model, arrival)
        async with self._session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                outcome = Outcome.REJECTED if response.status in BUSY_STATUSES else Outcome.HTTP_ERROR
                stream.fail(outcome, f"{response.status}: {await response.text(errors='replace')}")
                return
            async for chunk in response.content.iter_any():
                now_s = clock()
                for data in parser.feed(chunk):
                    stream.take(data, now_s)


class _Stream:
    """One request's record while it grows."""

    def __init__(self, scheduled_s: float, sent_s: float) -> None:
        self.scheduled_s = scheduled_s
        self.sent_s = sent_s
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.brownout: BrownoutUsage | None = None
        self.done = False
        self.failure: tuple[Outcome, str] | None = None

    def take(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if event.get("error"):
            self.fail(Outcome.STREAM_ERROR, json.dumps(event["error"]))
        if event.get("choices"):
            self.last_token_s = now_s
            if self.first_token_s is None:
                self.first_token_s = now_s
        if usage := event.get("usage"):
            self.num_prompt_tokens = int(usage["prompt_tokens"])
            self.num_tokens = int(usage["completion_tokens"])
            self.brownout = _brownout_usage(usage.get("brownout"))

    def fail(self, outcome: Outcome, error: str) -> None:
        """The first failure is the one that counts; what comes after is its consequence."""
        if self.failure is None:
            self.failure = (outcome, error[:MAX_ERROR_CHARS])

    def record(self) -> RequestRecord:
        if not self.done:
            self.fail(Outcome.DISCONNECTED, "the stream ended without [DONE]")
        elif not self.num_tokens or self.first_token_s is None:
            self.fail(Outcome.MALFORMED, "no usage or no token in the stream")
        outcome, error = self.failure or (Outcome.COMPLETED, None)
        return RequestRecord(
            scheduled_s=self.scheduled_s,
            sent_s=self.sent_s,
            outcome=outcome,
            first_token_s=self.first_token_s,
            last_token_s=self.last_token_s,
            num_prompt_tokens=self.num_prompt_tokens,
            num_tokens=self.num_tokens,
            brownout=self.brownout,
            error=error,
        )


def _brownout_usage(usage: dict[str, Any] | None) -> BrownoutUsage | None:
    if not usage:
        return None
    return BrownoutUsage(
        routed_pairs=usage["routed_pairs"],
        dimmed_pairs=usage["dimmed_pairs"],
        level_peak=usage["level_peak"],
        level_mean=usage["level_mean"],
        setting_version=usage["setting_version"],
    )
