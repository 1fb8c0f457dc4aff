"""The replica's end of the control stream: telemetry up, brownout settings down, for as long as the replica lives.

A controller that is slow, dead, restarted elsewhere or talking nonsense never disturbs the engine: the agent drops the
stream, asks again where the controller is, and comes back. Protobuf stays in here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc

from engine.telemetry import RELATIVE_ERROR, ClassWindow, PhaseWindow, QuantileSketch, StepWindow
from engine.types import BrownoutSetting, ModelInfo, Phase, PhaseSetting
from protos import control_pb2, control_pb2_grpc, telemetry_pb2

log = logging.getLogger(__name__)

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
ADDRESS_TIMEOUT_S = 10.0
HELLO_TIMEOUT_S = 2.0

_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would inherit the old one's connect backoff
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
)
_PHASES = {telemetry_pb2.PREFILL: Phase.PREFILL, telemetry_pb2.DECODE: Phase.DECODE}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}


class TelemetryAgent:
    """Keeps one stream to the controller open. Nothing that happens on it is raised to the caller.

    ``address_provider`` is asked before every attempt. ``take_window`` is called once per ``period_s`` while a stream
    is open. ``on_setting`` gets every setting for this model that makes sense, renewals included, and says whether it
    took it; all three run on the agent's event loop.
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
    ) -> None:
        self._address_provider = address_provider
        self._replica_id = replica_id
        self._model_info = model_info
        self._on_setting = on_setting
        self._take_window = take_window
        self._incarnation = random.getrandbits(63)  # tells this life of the replica from an earlier one
        self._period_s = period_s
        self._applied = (0, 0)  # (epoch, version)
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
                async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
                    await self._converse(control_pb2_grpc.ControlStub(channel).Stream())
            except Exception as error:  # whatever the controller or its discovery throws, the replica serves on
                log.debug("control stream failed: %s", error)
            if self.connected:
                log.warning("lost the controller; the last setting stays until its lease ends")
                backoff_s = MIN_BACKOFF_S
            self.connected = False
            # Full jitter: replicas that lost the same controller must not return in one wave.
            await asyncio.sleep(random.uniform(MIN_BACKOFF_S / 2, backoff_s))
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

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
            with suppress(asyncio.CancelledError):
                await asyncio.gather(reporter, return_exceptions=True)

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
                self._applied = (setting.epoch, setting.version)
        except Exception as error:
            log.warning("refused a setting: %s", error)
            return
        if not self.connected:
            self.connected = True
            self.num_connections += 1
            log.info("connected to the controller, epoch %d version %d", setting.epoch, setting.version)

    def _hello(self) -> control_pb2.Hello:
        info = self._model_info
        return control_pb2.Hello(
            replica_id=self._replica_id,
            model_id=info.name,
            incarnation=self._incarnation,
            num_levels=info.num_levels,
            ladder_measured=info.ladder_measured,
            applied_epoch=self._applied[0],
            applied_version=self._applied[1],
            level_loss=info.level_loss,
        )


def setting_from_proto(message: control_pb2.BrownoutSetting) -> BrownoutSetting:
    """ValueError if a phase is missing or a value cannot work."""
    phases = {_PHASES.get(phase.phase): phase for phase in message.phases}
    if Phase.PREFILL not in phases or Phase.DECODE not in phases:
        raise ValueError("a setting must name both phases")
    if not message.lease_s > 0:
        raise ValueError(f"lease_s {message.lease_s} must be positive")
    return BrownoutSetting(
        prefill=_phase_setting(phases[Phase.PREFILL]),
        decode=_phase_setting(phases[Phase.DECODE]),
        epoch=message.epoch,
        version=message.version,
        lease_s=message.lease_s,
        law=message.law,
        reason=message.reason,
    )


def _phase_setting(message: control_pb2.PhaseSetting) -> PhaseSetting:
    return PhaseSetting(floor=message.floor, ceiling=message.ceiling, budget_s=message.budget_s, margin=message.margin)


def window_to_proto(window: StepWindow) -> telemetry_pb2.StepWindow:
    """The message without its sender's identity."""
    stats = window.stats
    return telemetry_pb2.StepWindow(
        sequence=window.sequence,
        window_s=window.window_s,
        phases=[_phase_to_proto(phase, part) for phase, part in window.phases.items()],
        classes=[_class_to_proto(service_class, part) for service_class, part in window.classes.items()],
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        queued_prefill_tokens=stats.queued_prefill_tokens,
        oldest_wait_s=stats.oldest_wait_s,
        kv_used_frac=stats.kv_used_frac,
        level_prefill=stats.levels.prefill,
        level_decode=stats.levels.decode,
        routed_pairs=window.routed_pairs,
        dimmed_pairs=window.dimmed_pairs,
        num_preemptions=window.num_preemptions,
        applied_epoch=window.applied_epoch,
        applied_version=stats.setting_version,
        lease_expired=stats.lease_expired,
        trim=window.trim,
        predicted_step_time_s=window.predicted_step_time_s,
    )


def _phase_to_proto(phase: Phase, part: PhaseWindow) -> telemetry_pb2.PhaseWindow:
    return telemetry_pb2.PhaseWindow(
        phase=_PHASE_NUMBERS[phase],
        num_steps=part.num_steps,
        num_tokens=part.num_tokens,
        level_tokens=part.level_tokens,
        level_peak=part.level_peak,
        step_time_s=_sketch_to_proto(part.step_time_s),
    )


def _class_to_proto(service_class: str, part: ClassWindow) -> telemetry_pb2.ClassWindow:
    return telemetry_pb2.ClassWindow(
        service_class=service_class,
        num_finished=part.num_finished,
        num_failed=part.num_failed,
        num_ttft_ok=part.num_ttft_ok,
        num_tpot_ok=part.num_tpot_ok,
        queue_wait_s=_sketch_to_proto(part.queue_wait_s),
        ttft_s=_sketch_to_proto(part.ttft_s),
        tpot_s=_sketch_to_proto(part.tpot_s),
    )


def _sketch_to_proto(sketch: QuantileSketch) -> telemetry_pb2.QuantileSketch:
    buckets = sorted(sketch.counts)
    return telemetry_pb2.QuantileSketch(
        relative_error=RELATIVE_ERROR,
        bucket=buckets,
        count=[sketch.counts[bucket] for bucket in buckets],
        zero_count=sketch.zero_count,
        sum=sketch.total,
    )
