"""What replicas report, as the controller holds it: the messages of telemetry.proto and the Hello of control.proto."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from controller.sketch import QuantileSketch
from controller.types import Phase


@dataclass(frozen=True, slots=True)
class Hello:
    """A replica's introduction; (applied_epoch, applied_version) is the last setting it got from any controller."""

    replica_id: str
    model_id: str
    incarnation: int
    num_levels: int
    ladder_measured: bool
    applied_epoch: int = 0
    applied_version: int = 0
    level_loss: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PhaseWindow:
    """Steps of one window in which the phase had at least one row."""

    num_steps: int = 0
    num_tokens: int = 0
    level_tokens: int = 0  # sum over tokens of the level they ran at
    level_peak: int = 0
    step_time_s: QuantileSketch = field(default_factory=QuantileSketch)

    @staticmethod
    def merged(windows: Iterable[PhaseWindow]) -> PhaseWindow:
        windows = tuple(windows)
        return PhaseWindow(
            num_steps=sum(w.num_steps for w in windows),
            num_tokens=sum(w.num_tokens for w in windows),
            level_tokens=sum(w.level_tokens for w in windows),
            level_peak=max((w.level_peak for w in windows), default=0),
            step_time_s=QuantileSketch.merged(w.step_time_s for w in windows),
        )


@dataclass(frozen=True, slots=True)
class ClassWindow:
    """Requests of one window, as their clients saw them."""

    num_finished: int = 0
    num_failed: int = 0
    num_ttft_ok: int = 0
    num_tpot_ok: int = 0
    queue_wait_s: QuantileSketch = field(default_factory=QuantileSketch)
    ttft_s: QuantileSketch = field(default_factory=QuantileSketch)
    tpot_s: QuantileSketch = field(default_factory=QuantileSketch)

    @staticmethod
    def merged(windows: Iterable[ClassWindow]) -> ClassWindow:
        windows = tuple(windows)
        return ClassWindow(
            num_finished=sum(w.num_finished for w in windows),
            num_failed=sum(w.num_failed for w in windows),
            num_ttft_ok=sum(w.num_ttft_ok for w in windows),
            num_tpot_ok=sum(w.num_tpot_ok for w in windows),
            queue_wait_s=QuantileSketch.merged(w.queue_wait_s for w in windows),
            ttft_s=QuantileSketch.merged(w.ttft_s for w in windows),
            tpot_s=QuantileSketch.merged(w.tpot_s for w in windows),
        )


@dataclass(frozen=True, slots=True)
class StepWindow:
    """One report of one replica; fields as in telemetry.proto."""

    replica_id: str
    model_id: str
    incarnation: int
    sequence: int
    window_s: float
    phases: dict[Phase, PhaseWindow] = field(default_factory=dict)
    classes: dict[str, ClassWindow] = field(default_factory=dict)
    num_running: int = 0
    num_waiting: int = 0
    queued_prefill_tokens: int = 0
    oldest_wait_s: float = 0.0
    kv_used_frac: float = 0.0
    level_prefill: int = 0
    level_decode: int = 0
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    num_preemptions: int = 0
    applied_epoch: int = 0
    applied_version: int = 0
    lease_expired: bool = False
    trim: float = 1.0
    predicted_step_time_s: tuple[float, ...] = ()
