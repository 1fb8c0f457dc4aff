"""The ingress's side of one channel: all its requests to one replica, and their outputs, over one gRPC stream.

A replica that dies, hangs as a process, or is cut off is noticed by the connection, at the latest by a missing answer
to a ping; every request that it held then ends with ReplicaLostError.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

import grpc

from cluster.transport.batcher import Batcher
from cluster.transport.messages import (
    MAX_MESSAGE_BYTES,
    METHOD,
    TOKEN_KEY,
    Drop,
    Order,
    Submit,
    decode_answer,
    encode,
    to_error,
)
from engine.types import EngineDeadError, GenerationRequest, RequestOutput

PING_PERIOD_MS = 1_500
PING_TIMEOUT_MS = 2_500  # both together: a hung or cut off replica is noticed within 4 s
CONNECT_TIMEOUT_S = 3.0

logger = logging.getLogger(__name__)


class ReplicaLostError(Exception):
    """The replica died, hung, or was cut off, while it served a request; another one may be asked if ``may_retry``."""

    def __init__(self, message: str, may_retry: bool = True) -> None:
        super().__init__(message)
        self.may_retry = may_retry


class ReplicaChannel:
    """Made by `open`. ``on_lost`` is called once, when the channel has ended by itself."""

    def __init__(self, replica_id: str, on_lost: Callable[[ReplicaChannel], None]) -> None:
        self.replica_id = replica_id
        self._on_lost = on_lost
        self._streams: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._orders: Batcher[Order] = Batcher()
        self._tasks: list[asyncio.Task[None]] = []
        self._channel: grpc.aio.Channel | None = None
        self._lost: str | None = None

    @classmethod
    async def open(
        cls, replica_id: str, address: str, token: str, on_lost: Callable[[ReplicaChannel], None]
    ) -> ReplicaChannel:
        """Raises ReplicaLostError when the replica cannot be reached."""
        self = cls(replica_id, on_lost)
        self._channel = grpc.aio.insecure_channel(
            address,
            options=(
                ("grpc.enable_http_proxy", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.keepalive_time_ms", PING_PERIOD_MS),
                ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
                ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),  # the one that counts, else a minute
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, never one that is backing off
            ),
        )
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._channel.channel_ready()
        except TimeoutError as error:
            await self._channel.close()
            raise ReplicaLostError(f"replica {replica_id} cannot be reached at {address}") from error
        call = self._channel.stream_stream(METHOD)(metadata=((TOKEN_KEY, token),))
        self._tasks = [asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))]
        return self

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs until one has a finish_reason; closing it early ends the request in the engine.

        Raises ReplicaLostError, DrainingError and the engine's refusals.
        """
        if self._lost is not None:
            raise ReplicaLostError(self._lost)
        stream: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._streams[request.request_id] = stream
        self._orders.put(Submit(request))
        finished = False
        try:
            while not finished:
                item = await stream.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            del self._streams[request.request_id]
            if not finished:
                self._orders.put(Drop(request.request_id))

    async def close(self) -> None:
        """End the channel and, with it, its requests."""
        self._end("the channel was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        reason = "the replica ended the channel"
        try:
            async for message in call:
                answer = decode_answer(message)
                for output in answer.outputs:
                    self._deliver(output.request_id, output)
                for refusal in answer.refusals:
                    error = to_error(refusal)
                    if isinstance(error, EngineDeadError):
                        error = ReplicaLostError(str(error))
                    self._deliver(refusal.request_id, error)
        except grpc.aio.AioRpcError as error:
            reason = f"the connection to the replica broke ({error.code().name.lower()})"
        except Exception:
            logger.exception("channel to replica %s", self.replica_id)
            reason = "the replica's answer could not be read"
        if self._lost is None:
            logger.warning("replica %s is lost with %d requests: %s", self.replica_id, self.num_open, reason)
            self._end(reason)
            self._on_lost(self)

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while True:
                await call.write(encode(await self._orders.take()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reader sees the same and ends the channel

    def _deliver(self, request_id: str, item: RequestOutput | Exception) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put_nowait(item)

    def _end(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            for request_id in self._streams:
                self._deliver(request_id, ReplicaLostError(f"the replica that served the request was lost: {reason}"))
