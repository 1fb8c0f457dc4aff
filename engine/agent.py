"""The replica's end of the control stream: telemetry up, brownout settings down, for as long as the replica lives.

A controller that is slow, dead, restarted elsewhere or talking nonsense never disturbs the engine: the agent drops the
stream, asks again where the controller is, and comes back. Protobuf stays in here and in wire.py.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from engine.telemetry import StepWindow
from engine.types import BrownoutSetting, ModelInfo
from engine.wire import setting_from_proto, setting_to_proto, window_to_proto
from protos import control_pb2, control_pb2_grpc

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 0.5  # a controller that is back has all its replicas back within a second
ADDRESS_TIMEOUT_S = 10.0
HELLO_TIMEOUT_S = 2.0

_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 5000),  # silence is noticed sooner: see _converse
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would inherit the old one's connect backoff
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class ControlCredentials:
    """How to trust the controller, and be trusted. ``ca_pem`` None: no TLS; ``token`` empty: none is asked for.

    ``server_name``: what the controller's certificate must name; empty: the address.
    """

    ca_pem: bytes | None = None
    token: str = field(default="", repr=False)
    server_name: str = ""


class OutdatedControllerError(RuntimeError):
    """The controller's settings are older than the one in force: a newer controller exists."""


class TelemetryAgent:
    """Keeps one stream to the controller open. Nothing that happens on it is raised to the caller.

    ``address_provider`` is asked before every attempt. ``take_window`` is called once per ``period_s`` while a stream
    is open. ``on_setting`` gets every setting for this model that makes sense, renewals included, and says whether it
    took it; all three run on the agent's event loop. ``start_s``: what it took the replica's process to be ready.
    """

    def __init__(
        self,
        *,
        address_provider: Callable[[], Awaitable[str]],
        replica_id: str,
        model_info: ModelInfo,
        on_setting: Callable[[BrownoutSetting], bool],
        take_window: Callable[[], StepWindow],
        period_s: float = 0.25,
        credentials: ControlCredentials | None = None,
        start_s: float = 0.0,
    ) -> None:
        self._address_provider = address_provider
        self._replica_id = replica_id
        self._model_info = model_info
        self._on_setting = on_setting
        self._take_window = take_window
        self._incarnation = random.getrandbits(63)  # tells this life of the replica from an earlier one
        self._period_s = period_s
        self._applied: BrownoutSetting | None = None
        self._credentials = credentials or ControlCredentials()
        self._start_s = start_s
        self._task: asyncio.Task[None] | None = None
        self.connected = False  # a setting has arrived on the stream that is open
        self.num_connections = 0

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._keep_connected(), name="telemetry-agent")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _keep_connected(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                async with asyncio.timeout(ADDRESS_TIMEOUT_S):
                    address = await self._address_provider()
                async with self._channel(address) as channel:
                    await self._converse(control_pb2_grpc.ControlStub(channel).Stream(metadata=self._metadata()))
            except OutdatedControllerError as error:
                log.warning("left the controller at %s: %s", address, error)
            except Exception as error:  # whatever the controller or its discovery throws, the replica serves on
                log.debug("control stream failed: %s", error)
            if self.connected:
                log.warning("lost the controller; the last setting stays until its lease ends")
                backoff_s = MIN_BACKOFF_S
            self.connected = False
            # Full jitter: replicas that lost the same controller must not return in one wave.
            await asyncio.sleep(random.uniform(MIN_BACKOFF_S / 2, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._credentials.ca_pem is None:
            return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        credentials = grpc.ssl_channel_credentials(self._credentials.ca_pem)
        name = self._credentials.server_name
        options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)) if name else _CHANNEL_OPTIONS
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = self._credentials.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    async def _converse(self, call: Any) -> None:
        """One stream, from Hello to its end."""
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            await call.write(control_pb2.ReplicaMessage(hello=self._hello()))
        reporter = asyncio.create_task(self._report(call))
        try:
            # A controller renews leases long before they end, so silence for a whole lease means that it is gone or
            # hangs. gRPC's keepalive would notice neither a hanging event loop nor a peer that we keep writing to.
            silence_s = HELLO_TIMEOUT_S
            while True:
                async with asyncio.timeout(silence_s):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    return
                self._receive(message)
                silence_s = max(message.setting.lease_s, 2 * self._period_s)
        finally:
            reporter.cancel()
            call.cancel()
            await asyncio.gather(reporter, return_exceptions=True)  # a cancellation that comes now is for us

    async def _report(self, call: Any) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                window = window_to_proto(self._take_window())
                window.replica_id, window.model_id = self._replica_id, self._model_info.name
                window.incarnation = self._incarnation
            except Exception:
                log.exception("no telemetry window this time")
                continue
            await call.write(control_pb2.ReplicaMessage(window=window))

    def _receive(self, message: control_pb2.ControllerMessage) -> None:
        try:
            setting = setting_from_proto(message.setting)
            if message.setting.model_id != self._model_info.name:
                raise ValueError(f"a setting for model {message.setting.model_id!r}")
            if self._on_setting(setting):
                self._applied = setting
            elif self._applied is not None and self._applied.newer_than(setting):
                raise OutdatedControllerError(
                    f"its epoch {setting.epoch} version {setting.version} is older than "
                    f"epoch {self._applied.epoch} version {self._applied.version}"
                )
        except OutdatedControllerError:
            raise
        except Exception as error:
            log.warning("refused a setting: %s", error)
            return
        if not self.connected:
            self.connected = True
            self.num_connections += 1
            log.info("connected to the controller, epoch %d version %d", setting.epoch, setting.version)

    def _hello(self) -> control_pb2.Hello:
        info, applied = self._model_info, self._applied
        return control_pb2.Hello(
            replica_id=self._replica_id,
            model_id=info.name,
            incarnation=self._incarnation,
            num_levels=info.num_levels,
            ladder_measured=info.ladder_measured,
            applied_epoch=applied.epoch if applied else 0,
            applied_version=applied.version if applied else 0,
            level_loss=info.level_loss,
            applied=setting_to_proto(applied, info.name) if applied else None,
            start_s=self._start_s,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            full_step_time_s=info.step_time_s_by_level,
        )
