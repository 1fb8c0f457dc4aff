"""The controller's vocabulary: what laws observe and decide. Pure data: no torch, ray, grpc or clock.

A law is ``step(state, observation, now_s) -> (state, decision)`` over these frozen dataclasses, so live serving,
replay and the simulator run the same object. ``None`` means "unknown" or "no opinion", never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Reason(StrEnum):
    """Why a decision was taken; one value for ledger, metric label and log line."""

    STARTUP = "startup"
    RESTORED = "restored"  # continued from the persisted setting after a controller restart
    PINNED = "pinned"  # an operator fixed the level
    BROWNOUT_OFF = "brownout_off"  # an operator switched dimming off
    UNMEASURED_LADDER = "unmeasured_ladder"  # no quality curve, no dimming
    QUALITY_BUDGET = "quality_budget"  # a class may lose no more quality for now
    HOLD_ENDED = "hold_ended"  # nothing was observed for so long that what was decided on it does not hold any more
    NO_DATA = "no_data"  # nothing was observed: unknown, not idle
    STALE_DATA = "stale_data"
    SLO_VIOLATED = "slo_violated"
    SLO_MET = "slo_met"
    HEADROOM = "headroom"


@dataclass(frozen=True, slots=True)
class Slo:
    """The promise to keep: TTFT with queue wait, and mean time per later token."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class PhaseObservation:
    """One phase over the law's window. Quantiles are None when the window holds no sample."""

    num_steps: int = 0
    num_tokens: int = 0
    step_time_p50_s: float | None = None
    step_time_p90_s: float | None = None
    level_mean: float = 0.0
    level_peak: int = 0


@dataclass(frozen=True, slots=True)
class QualitySpent:
    """Quality lost since the controller began to observe; these only grow."""

    num_tokens: int = 0  # computed for the class
    loss_nats: float = 0.0  # sum over these tokens of the loss of their level


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one model's replicas at a tick."""

    num_replicas: int = 0  # with a live stream
    num_stale: int = 0  # live streams whose last window is overdue, or not believed
    num_quarantined: int = 0  # of these, replicas whose reports are not believed
    num_levels: int = 1  # the shortest ladder among them
    ladder_measured: bool = False
    level_loss: tuple[float, ...] = ()  # nats at each level, the worst among the replicas; empty: not measured
    evidence_age_s: float | None = None  # since a replica last reported a step, or the first one came; None: none has
    prefill: PhaseObservation = field(default_factory=PhaseObservation)
    decode: PhaseObservation = field(default_factory=PhaseObservation)
    num_finished: int = 0
    num_failed: int = 0
    ttft_p50_s: float | None = None
    ttft_p90_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p90_s: float | None = None
    tpot_p99_s: float | None = None
    queue_wait_p90_s: float | None = None
    num_running: int = 0
    num_waiting: int = 0
    queued_prefill_tokens: int = 0
    oldest_wait_s: float = 0.0
    kv_used_frac: float = 0.0
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    level_now: float = 0.0  # mean over replicas of the decode level at the last window's end
    level_peak_now: int = 0
    measured_per_predicted_p50: float | None = None  # step times over their predictions: the model's bias
    measured_per_predicted_p90: float | None = None
    spent: Mapping[str, QualitySpent] = field(default_factory=dict)  # service class |-> quality lost
    observed_s: float = 0.0  # sum of the windows' lengths over all replicas since the controller began


@dataclass(frozen=True, slots=True)
class PhaseDecision:
    """The governor's room in one phase; floor == ceiling pins the level."""

    floor: int
    ceiling: int
    budget_s: float
    margin: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a law wants in force until it says otherwise."""

    prefill: PhaseDecision
    decode: PhaseDecision
    law: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Setting:
    """A decision with its place in the total order of settings, (epoch, version), and its lease."""

    decision: Decision
    model_id: str
    epoch: int
    version: int
    lease_s: float
