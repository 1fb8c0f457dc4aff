"""Clients of the soak: most behave, some leave half-way, some send nonsense; each request's end is noted."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.loadgen.client import completion_body
from benchmarks.loadgen.sse import SseParser
from benchmarks.tiny import MODEL
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import endless
from cluster.ingress.trace import REQUEST_ID_HEADER

KINDS = ("bad", *["abandoned"] * 2, *["read"] * 17)  # of every twenty requests, in an order that is drawn
PROMPT_TOKENS = LengthRange(8, 96)
OUTPUT_TOKENS = LengthRange(32, 160)
HUNG_S = 180.0  # a request that has not ended by then never will
VOCAB_SIZE = 4000
BAD_BODIES: tuple[tuple[bytes, int], ...] = (
    (b"{not json", 400),
    (json.dumps({"model": "nobody", "prompt": "x"}).encode(), 404),
    (json.dumps({"model": MODEL, "prompt": [1] * 5000, "max_tokens": 4}).encode(), 400),
    (json.dumps({"model": MODEL, "prompt": "x", "temperature": 9}).encode(), 400),
    (json.dumps({"model": MODEL, "prompt": "x", "max_tokens": "many"}).encode(), 400),
)


@dataclass(slots=True)
class Endings:
    """How every request ended, as its client saw it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_sent: int = 0
    num_hung: int = 0
    num_by_proxy: int = 0  # refused by the proxy in front, unseen by the ingress
    unexpected: list[str] = field(default_factory=list)  # the first few

    def note(self, outcome: str, unexpected: str = "") -> None:
        self.outcomes[outcome] += 1
        if unexpected and len(self.unexpected) < 20:
            self.unexpected.append(f"{outcome}: {unexpected}")


class SoakClient:
    """Sends requests, some of them bad and some abandoned, and notes how each ended."""

    def __init__(self, session: aiohttp.ClientSession, url: str, endings: Endings, draw: random.Random) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._endings = endings
        self._draw = draw
        self._requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB_SIZE, draw.randrange(2**31))
        self._kinds: list[str] = []  # of the next requests

    async def send(self) -> None:
        endings = self._endings
        endings.num_sent += 1
        self._kinds = self._kinds or self._draw.sample(KINDS, len(KINDS))
        kind = self._kinds.pop()
        try:
            async with asyncio.timeout(HUNG_S):
                if kind == "bad":
                    await self._send_bad(*self._draw.choice(BAD_BODIES))
                else:
                    await self._stream(leaves=kind == "abandoned")
        except TimeoutError:
            endings.num_hung += 1
            endings.note("hung", f"no end within {HUNG_S:g} s")
        except (aiohttp.ClientError, OSError) as error:
            endings.note("connection_error", repr(error))

    async def _send_bad(self, body: bytes, status: int) -> None:
        headers = {"content-type": "application/json"}
        async with self._session.post(self._url, data=body, headers=headers) as response:
            text = await response.text()
            if response.status == 503:
                self._endings.num_by_proxy += REQUEST_ID_HEADER not in response.headers
                return self._endings.note("busy")
            right = response.status == status and "error" in json.loads(text)
            return self._endings.note(
                "refused" if right else "wrong_status", "" if right else f"{response.status} {text}"
            )

    async def _stream(self, leaves: bool) -> None:
        arrival = next(self._requests)
        leave_after = self._draw.randrange(3) if leaves else sys.maxsize
        parser, num_events, num_tokens = SseParser(), 0, 0
        async with self._session.post(self._url, json=completion_body(MODEL, arrival)) as response:
            if response.status != 200:
                self._endings.num_by_proxy += REQUEST_ID_HEADER not in response.headers
                return self._refused(response.status, await response.text())
            async for chunk in response.content.iter_any():
                for data in parser.feed(chunk):
                    num_events += 1
                    if data == b"[DONE]":
                        right = num_tokens == arrival.max_tokens
                        return self._endings.note("ok" if right else "wrong_length", "" if right else f"{num_tokens}")
                    event = json.loads(data)
                    if event.get("error"):
                        return self._failed(event["error"])
                    num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                if num_events > leave_after:
                    return self._endings.note("abandoned")  # leaving the block closes the connection
        return self._endings.note("cut_off", "the stream ended without [DONE]")

    def _refused(self, status: int, text: str) -> None:
        if status in (429, 503):
            return self._endings.note("busy")
        code = json.loads(text).get("error", {}).get("code")
        if code == "replica_lost":
            return self._endings.note("replica_lost")
        return self._endings.note("wrong_status", f"{status} {text}")

    def _failed(self, error: dict[str, Any]) -> None:
        known = error["code"] == "replica_lost"
        return self._endings.note("replica_lost" if known else "stream_error", "" if known else json.dumps(error))
