"""What replicas report, as the controller holds it: the messages of telemetry.proto and the Hello of control.proto."""

from __future__ import annotations

from dataclasses import dataclass, field

from controller.sketch import QuantileSketch
from controller.types import Phase, Setting


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
    applied: Setting | None = None
    start_s: float = 0.0  # from its process's start until it could serve; 0: not known
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    full_step_time_s: tuple[float, ...] = ()  # profiled at each level, with a full decode batch


@dataclass(frozen=True, slots=True)
class ShapeWindow:
    """Steps of one size class."""

    num_steps: int = 0
    step_time_s: float = 0.0  # sum


@dataclass(frozen=True, slots=True)
class PhaseWindow:
    """Steps of one window in which the phase had at least one row."""

    num_steps: int = 0
    num_tokens: int = 0
    level_tokens: int = 0  # sum over tokens of the level they ran at
    level_peak: int = 0
    step_time_s: QuantileSketch = field(default_factory=QuantileSketch)
    shapes: dict[int, ShapeWindow] = field(default_factory=dict)  # log2 of the step's tokens, rounded up |-> steps


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
    num_tokens: int = 0  # computed, prompt and completion
    loss_nats: float = 0.0  # sum over these tokens of the quality loss of their level


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Where the pairs went, layer by layer: columns as in telemetry.proto."""

    layer: tuple[int, ...]
    active_experts: tuple[float, ...]
    balance_index: tuple[float, ...]
    num_hot: int
    hot_expert: tuple[int, ...]
    hot_share: tuple[float, ...]


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
    measured_per_predicted: QuantileSketch = field(default_factory=QuantileSketch)
    experts: ExpertLoad | None = None
