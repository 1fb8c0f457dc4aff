"""The controller's end of one replica's stream: reports in, the newest setting out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from controller.reports import Hello, StepWindow
from controller.types import Setting
from controller.wire import WireError, read_hello, read_window, write_setting
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


class Hub(Protocol):
    """What streams report to."""

    def join(self, stream: ReplicaStream, hello: Hello) -> None: ...

    def leave(self, stream: ReplicaStream, hello: Hello) -> None: ...

    def offer(self, window: StepWindow) -> None: ...


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
    """Serves Control.Stream: the first message is a Hello, all others are windows."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def Stream(
        self,
        messages: AsyncIterator[control_pb2.ReplicaMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> None:
        hello = await self._greeted(messages, context)
        stream = ReplicaStream()
        self._hub.join(stream, hello)
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
            self._hub.offer(read_window(message.window, hello))
        except WireError as error:
            stream.num_refused += 1
            if stream.num_refused == 1:
                log.warning("refused a window of replica %s: %s", hello.replica_id, error)


async def _forward(stream: ReplicaStream, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    while True:
        await context.write(write_setting(await stream.next_setting()))
