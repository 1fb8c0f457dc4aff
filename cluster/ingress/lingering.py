"""A refusal that comes while the client still sends its body."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from fastapi import Response
from starlette.types import Receive, Scope, Send

LINGER_S = 2.0
LINGER_BYTES = 16 * 1024 * 1024


class LingeringResponse(Response):
    """Answers at once, and then reads and throws away what still comes, up to LINGER_S and LINGER_BYTES.

    A connection that is closed on a client that sends is reset, and the client never reads the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    num_bytes = 0
    while num_bytes <= LINGER_BYTES:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
