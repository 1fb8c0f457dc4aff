"""The controller's end of one replica's stream: reports in, the newest setting out."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from controller.reports import Hello, StepWindow
from controller.types import Setting
from controller.wire import read_hello, read_window, write_setting
from controller.wire_parts import WireError
from protos import control_pb2, control_pb2_grpc

log = logging.getLogger(__name__)

MAX_SILENCE_S = 30.0  # far beyond stale: the replica's host is gone, or it will connect again

SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second controller on our port must fail, not share it
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # the replicas' own keepalive is welcome
)


class JoinRefusedError(RuntimeError):
    """This controller must not or cannot control the replica now; it should look for another."""


class Hub(Protocol):
    """What streams report to."""

    async def join(self, stream: ReplicaStream, hello: Hello) -> None:
        """Raises JoinRefusedError."""

    def leave(self, stream: ReplicaStream, hello: Hello) -> None: ...

    def offer(self, stream: ReplicaStream, window: StepWindow) -> None: ...

    def refuse(self, stream: ReplicaStream, hello: Hello) -> None:
        """The replica sent something that could not be true."""


class ReplicaStream:
    """A mailbox of one: a replica that reads slowly gets the newest setting, never a backlog."""

    def __init__(self) -> None:
        self.sent_at_s = float("-inf")
        self.num_refused = 0  # windows that could not be true
        self._setting: Setting | None = None
        self._filled = asyncio.Event()

    def send(self, setting: Setting, now_s: float) -> None:
        self._setting, self.sent_at_s = setting, now_s
        self._filled.set()

    async def next_setting(self) -> Setting:
        await self._filled.wait()
        self._filled.clear()
        assert self._setting is not None
        return self._setting


class StreamServicer(control_pb2_grpc.ControlServicer):
    """Serves Control.Stream: a Hello, then windows. ``token`` empty: none is asked for."""

    def __init__(self, hub: Hub, token: str = "") -> None:
        self._hub = hub
        self._authorization = f"Bearer {token}" if token else ""

    async def Stream(
        self,
        messages: AsyncIterator[control_pb2.ReplicaMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        await self._authorize(context)
        hello = await self._greeted(messages, context)
        stream = ReplicaStream()
        try:
            await self._hub.join(stream, hello)
        except JoinRefusedError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        sender = asyncio.create_task(_forward(stream, context))
        log.info("replica %s of %s connected", hello.replica_id, hello.model_id)
        try:
            while True:
                async with asyncio.timeout(MAX_SILENCE_S):
                    message = await anext(messages)
                self._take(message, hello, stream)
        except StopAsyncIteration:
            pass
        except TimeoutError:
            log.warning("replica %s of %s said nothing for %g s", hello.replica_id, hello.model_id, MAX_SILENCE_S)
        finally:
            sender.cancel()
            self._hub.leave(stream, hello)
            log.info("replica %s of %s left", hello.replica_id, hello.model_id)

    async def _authorize(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not self._authorization:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        given = given if isinstance(given, bytes) else given.encode()
        if not hmac.compare_digest(given, self._authorization.encode()):
            log.warning("refused a stream from %s: wrong token", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the shared token is missing or wrong")

    async def _greeted(
        self,
        messages: AsyncIterator[control_pb2.ReplicaMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Hello:
        async for message in messages:
            if message.WhichOneof("body") != "hello":
                break
            try:
                return read_hello(message.hello)
            except WireError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"hello refused: {error}")
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a Hello")
        raise AssertionError("abort raises")

    def _take(self, message: control_pb2.ReplicaMessage, hello: Hello, stream: ReplicaStream) -> None:
        try:
            if message.WhichOneof("body") != "window":
                raise WireError("only windows may follow the Hello")
            self._hub.offer(stream, read_window(message.window, hello))
        except WireError as error:
            stream.num_refused += 1
            self._hub.refuse(stream, hello)
            if stream.num_refused == 1:
                log.warning("refused a window of replica %s: %s", hello.replica_id, error)


async def _forward(stream: ReplicaStream, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    while True:
        await context.write(write_setting(await stream.next_setting()))
