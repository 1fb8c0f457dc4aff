"""The replica's side of the channels: one gRPC stream per ingress process carries all its requests and their outputs.

Whatever an engine step produced for one ingress leaves as one message. A channel that ends, or that does not take its
messages any more, ends its requests in the engine; the engine never waits for a channel.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc

from cluster.transport.batcher import Batcher
from cluster.transport.messages import (
    MAX_MESSAGE_BYTES,
    METHOD,
    TOKEN_KEY,
    Answer,
    DrainingError,
    Drop,
    Refusal,
    Submit,
    decode_orders,
    encode,
    refusal,
)
from engine.types import EngineDeadError, GenerationRequest, InvalidRequestError, RequestOutput

WRITE_TIMEOUT_S = 10.0  # an ingress that takes no message for so long is gone, or as good as
WATCH_PERIOD_S = 0.25

logger = logging.getLogger(__name__)


class RequestSink(Protocol):
    """What of an AsyncEngine the channels need."""

    def submit(self, request: GenerationRequest, deliver: Callable[[RequestOutput | Exception], None]) -> None: ...

    def drop(self, request_id: str) -> None: ...

    def check_health(self) -> None: ...


class ChannelServer:
    """Serves an engine to any number of ingress processes that know ``token``."""

    def __init__(self, engine: RequestSink, token: str) -> None:
        self._engine = engine
        self._token = token
        self._channels: set[_Channel] = set()
        self._server: grpc.aio.Server | None = None
        self._watch: asyncio.Task[None] | None = None
        self._draining = False
        self.num_submitted = 0  # requests that the engine was given, since start

    async def start(self, host: str) -> str:
        """Listen on a free port; returns ``host:port``."""
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),  # ingresses ping often, see channel.py
                ("grpc.keepalive_permit_without_calls", 1),
                # A silent ingress, its machine gone without a word, is dropped with all its requests.
                ("grpc.keepalive_time_ms", 5_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.http2.ping_timeout_ms", 5_000),
            )
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, method = METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = self._server.add_insecure_port(f"{host}:0")
        await self._server.start()
        self._watch = asyncio.create_task(self._watch_engine(), name="engine-watch")
        return f"{host}:{port}"

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests from now on and wait until the running ones have ended, at most ``timeout_s``."""
        self._draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.num_open:
                    await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """End all channels."""
        if self._watch is not None:
            self._watch.cancel()
        if self._server is not None:
            await self._server.stop(grace=0.5)

    @property
    def num_open(self) -> int:
        """Requests that have not ended, over all channels."""
        return sum(channel.num_open for channel in self._channels)

    async def _serve(self, orders: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        given = dict(context.invocation_metadata() or ()).get(TOKEN_KEY, "")
        if not hmac.compare_digest(str(given).encode(), self._token.encode()):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown token")
        channel = _Channel(self._engine, self._admit)
        self._channels.add(channel)
        reading = asyncio.create_task(channel.read(orders))
        writing = asyncio.create_task(channel.write(context))
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._channels.discard(channel)
            reading.cancel()
            writing.cancel()
            ends = await asyncio.gather(reading, writing, return_exceptions=True)
            if failures := [end for end in ends if isinstance(end, Exception)]:
                logger.warning("a channel ends: %r", failures[0])
            channel.close()

    def _admit(self) -> None:
        """Count a new request. Raises DrainingError."""
        if self._draining:
            raise DrainingError("the replica is being taken down")
        self.num_submitted += 1

    async def _watch_engine(self) -> None:
        """End every request as soon as the engine is known to be dead or wedged, so that none waits for it."""
        while True:
            await asyncio.sleep(WATCH_PERIOD_S)
            try:
                self._engine.check_health()
            except EngineDeadError as error:
                for channel in self._channels:
                    channel.fail(error)


class _Channel:
    """One ingress process: its open requests, and what is to be sent to it."""

    def __init__(self, engine: RequestSink, admit: Callable[[], None]) -> None:
        self._engine = engine
        self._admit = admit
        self._open: set[str] = set()
        self._outgoing: Batcher[RequestOutput | Refusal] = Batcher()

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def read(self, orders: AsyncIterator[bytes]) -> None:
        """Carry out orders until the ingress has no more."""
        async for message in orders:
            for order in decode_orders(message):
                match order:
                    case Submit(request):
                        self._submit(request)
                    case Drop(request_id):
                        self._open.discard(request_id)
                        self._engine.drop(request_id)

    async def write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Send what comes up. Raises TimeoutError when the ingress does not take it."""
        while True:
            items = await self._outgoing.take()
            outputs = [item for item in items if isinstance(item, RequestOutput)]
            refusals = [item for item in items if isinstance(item, Refusal)]
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await context.write(encode(Answer(outputs, refusals)))

    def fail(self, error: EngineDeadError) -> None:
        for request_id in list(self._open):
            self._engine.drop(request_id)
            self._deliver(request_id, error)

    def close(self) -> None:
        if self._open:
            logger.warning("an ingress is gone; its %d requests end", len(self._open))
        for request_id in self._open:
            self._engine.drop(request_id)
        self._open.clear()

    def _submit(self, request: GenerationRequest) -> None:
        request_id = request.request_id
        if request_id in self._open:
            error = InvalidRequestError(f"request id {request_id!r} is already in use", "request_id")
            self._outgoing.put(refusal(request_id, error))
            return
        try:
            self._admit()
            self._engine.submit(request, lambda item: self._deliver(request_id, item))
        except (InvalidRequestError, EngineDeadError, DrainingError) as error:
            self._outgoing.put(refusal(request_id, error))
        else:
            self._open.add(request_id)

    def _deliver(self, request_id: str, item: RequestOutput | Exception) -> None:
        if isinstance(item, Exception):
            self._open.discard(request_id)
            self._outgoing.put(refusal(request_id, item))
            return
        if item.finished:
            self._open.discard(request_id)
        self._outgoing.put(item)
