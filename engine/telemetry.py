"""What one replica measures about itself: samples go in from the engine's thread, a StepWindow comes out per period.

The dataclasses mirror telemetry.proto; agent.py puts them on the wire. Pure: no clock, the caller says what time it is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

from engine.config import SloConfig
from engine.sketch import QuantileSketch
from engine.types import EngineStats, Levels, Phase, ServiceClass

MAX_PENDING_STEPS = 64


@dataclass(slots=True)
class ShapeWindow:
    """Steps of one size class."""

    num_steps: int = 0
    step_time_s: float = 0.0  # sum

    def add(self, step_time_s: float) -> None:
        self.num_steps += 1
        self.step_time_s += step_time_s


@dataclass(slots=True)
class PhaseWindow:
    """Steps in which the phase had at least one row."""

    num_steps: int = 0
    num_tokens: int = 0
    level_tokens: int = 0  # sum over tokens of the level they ran at
    level_peak: int = 0
    step_time_s: QuantileSketch = field(default_factory=QuantileSketch)
    shapes: dict[int, ShapeWindow] = field(default_factory=dict)  # log2 of the step's tokens, rounded up |-> steps

    def add(self, num_tokens: int, step_tokens: int, level: int, step_time_s: float) -> None:
        """A step of ``step_tokens`` tokens, ``num_tokens`` of them of this phase."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.level_tokens += num_tokens * level
        self.level_peak = max(self.level_peak, level)
        self.step_time_s.add(step_time_s)
        _of(self.shapes, (step_tokens - 1).bit_length(), ShapeWindow).add(step_time_s)


@dataclass(slots=True)
class ClassWindow:
    """Requests of one service class, queue wait included."""

    num_finished: int = 0
    num_failed: int = 0
    num_ttft_ok: int = 0  # first tokens within the objective
    num_tpot_ok: int = 0  # finished requests within the objective; one without a later token cannot miss it
    queue_wait_s: QuantileSketch = field(default_factory=QuantileSketch)
    ttft_s: QuantileSketch = field(default_factory=QuantileSketch)
    tpot_s: QuantileSketch = field(default_factory=QuantileSketch)
    num_tokens: int = 0  # computed, prompt and completion
    loss_nats: float = 0.0  # sum over these tokens of the quality loss of the level they ran at


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Where the pairs of each MoE layer went in the last few steps; item i of each column belongs to ``layer[i]``."""

    layer: tuple[int, ...]
    active_experts: tuple[float, ...]  # mean over steps of the experts with at least one pair
    balance_index: tuple[float, ...]  # Jain's index over all experts: 1 all alike, 1/E all pairs on one
    num_hot: int  # busiest experts named per layer
    hot_expert: tuple[int, ...]  # num_hot for each layer, busiest first
    hot_share: tuple[float, ...]  # of the layer's pairs


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine. ``predicted_s`` was made before it; ``spent``: class |-> (tokens, their loss in nats)."""

    prefill_tokens: int
    decode_tokens: int
    levels: Levels
    step_time_s: float
    predicted_s: float | None = None
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    spent: Mapping[ServiceClass, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepWindow:
    """One report; ``stats`` are the gauges at its end. Nobody changes its parts once it has been drained.

    Whose it is (replica, model, incarnation) the agent writes on it: the engine does not know.
    """

    sequence: int  # 1, 2, 3 ... within a recorder's life
    window_s: float
    phases: Mapping[Phase, PhaseWindow]
    classes: Mapping[ServiceClass, ClassWindow]
    stats: EngineStats
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    num_preemptions: int = 0
    applied_epoch: int = 0
    trim: float = 1.0
    predicted_step_time_s: tuple[float, ...] = ()
    measured_per_predicted: QuantileSketch = field(default_factory=QuantileSketch)
    experts: ExpertLoad | None = None


@dataclass(slots=True)
class Totals:
    """Counters since the replica's start, for scraping. They only grow."""

    num_steps: int = 0
    step_time_s: float = 0.0
    predicted_steps: int = 0  # steps whose time had been predicted
    prediction_error_s: float = 0.0  # sum of |measured - predicted| over them
    prefill_tokens: int = 0
    decode_tokens: int = 0
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    loss_nats: float = 0.0  # sum over computed tokens of the quality loss of their level
    num_first_tokens: int = 0
    ttft_s: float = 0.0
    queue_wait_s: float = 0.0
    num_finished: int = 0
    num_failed: int = 0
    num_ttft_ok: int = 0
    num_tpot_ok: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class _Open:
    """The window that is being filled."""

    phases: dict[Phase, PhaseWindow] = field(default_factory=dict)
    classes: dict[ServiceClass, ClassWindow] = field(default_factory=dict)
    routed_pairs: int = 0
    dimmed_pairs: int = 0
    num_preemptions: int = 0
    measured_per_predicted: QuantileSketch = field(default_factory=QuantileSketch)
    experts: ExpertLoad | None = None


class TelemetryRecorder:
    """Thread-safe: the engine's thread records, the agent drains, a scraper reads the totals.

    ``now_s`` is any clock that does not go back; a window lasts from one drain to the next.
    """

    def __init__(self, slo: SloConfig, now_s: float = 0.0) -> None:
        self._slo = slo
        self._lock = threading.Lock()
        self._open = _Open()
        self._opened_at_s = now_s
        self._sequence = 0
        self._totals = Totals()
        self._steps: deque[StepRecord] = deque()  # not added up yet

    def record_step(self, step: StepRecord) -> None:
        """One step of the engine. A mixed step counts in both phases, with its whole time.

        Steps are added up many at a time: one by one, between two steps of a model, each would find cold caches.
        """
        self._steps.append(step)
        if len(self._steps) >= MAX_PENDING_STEPS:
            with self._lock:
                self._add_steps()

    def _add_steps(self) -> None:
        """Take the pending steps into window and totals. Call it with the lock held."""
        window, totals, pending = self._open, self._totals, self._steps
        while pending:
            step = pending.popleft()
            prefill, decode, time_s = step.prefill_tokens, step.decode_tokens, step.step_time_s
            if prefill:
                part = _of(window.phases, Phase.PREFILL, PhaseWindow)
                part.add(prefill, prefill + decode, step.levels.prefill, time_s)
            if decode:
                part = _of(window.phases, Phase.DECODE, PhaseWindow)
                part.add(decode, prefill + decode, step.levels.decode, time_s)
            for service_class, (num_tokens, loss_nats) in step.spent.items():
                spent = _of(window.classes, service_class, ClassWindow)
                spent.num_tokens += num_tokens
                spent.loss_nats += loss_nats
                totals.loss_nats += loss_nats
            if step.predicted_s:
                window.measured_per_predicted.add(time_s / step.predicted_s)
                totals.predicted_steps += 1
                totals.prediction_error_s += abs(time_s - step.predicted_s)
            window.routed_pairs += step.routed_pairs
            window.dimmed_pairs += step.dimmed_pairs
            totals.num_steps += 1
            totals.step_time_s += time_s
            totals.prefill_tokens += prefill
            totals.decode_tokens += decode
            totals.routed_pairs += step.routed_pairs
            totals.dimmed_pairs += step.dimmed_pairs

    def record_experts(self, experts: ExpertLoad) -> None:
        """The newest account of where pairs go; the window keeps the last one it got."""
        with self._lock:
            self._open.experts = experts

    def record_first_token(self, service_class: ServiceClass, ttft_s: float, queue_wait_s: float) -> None:
        """A request's first token left; ``ttft_s`` includes the ``queue_wait_s`` before its first step."""
        is_ok = ttft_s <= self._slo.ttft_s
        with self._lock:
            window, totals = _of(self._open.classes, service_class, ClassWindow), self._totals
            window.ttft_s.add(ttft_s)
            window.queue_wait_s.add(queue_wait_s)
            window.num_ttft_ok += is_ok
            totals.num_first_tokens += 1
            totals.ttft_s += ttft_s
            totals.queue_wait_s += queue_wait_s
            totals.num_ttft_ok += is_ok

    def record_finish(self, service_class: ServiceClass, tpot_s: float | None, failed: bool = False) -> None:
        """A request ended; ``tpot_s`` is its mean time per token after the first, None if there was none."""
        is_ok = not failed and (tpot_s is None or tpot_s <= self._slo.tpot_s)
        with self._lock:
            window, totals = _of(self._open.classes, service_class, ClassWindow), self._totals
            window.num_failed += failed
            window.num_finished += not failed
            window.num_tpot_ok += is_ok
            if tpot_s is not None and not failed:
                window.tpot_s.add(tpot_s)
            totals.num_failed += failed
            totals.num_finished += not failed
            totals.num_tpot_ok += is_ok

    def record_preemption(self, num_requests: int = 1) -> None:
        with self._lock:
            self._open.num_preemptions += num_requests
            self._totals.num_preemptions += num_requests

    def drain(
        self,
        stats: EngineStats,
        now_s: float,
        *,
        applied_epoch: int = 0,
        trim: float = 1.0,
        predicted_step_time_s: tuple[float, ...] = (),
    ) -> StepWindow:
        """Close the window at ``now_s`` and open the next. ``stats`` are the gauges at this moment."""
        with self._lock:
            self._add_steps()
            closed, self._open = self._open, _Open()
            window_s, self._opened_at_s = now_s - self._opened_at_s, now_s
            self._sequence += 1
            sequence = self._sequence
        return StepWindow(
            sequence=sequence,
            window_s=window_s,
            phases=closed.phases,
            classes=closed.classes,
            stats=stats,
            routed_pairs=closed.routed_pairs,
            dimmed_pairs=closed.dimmed_pairs,
            num_preemptions=closed.num_preemptions,
            applied_epoch=applied_epoch,
            trim=trim,
            predicted_step_time_s=predicted_step_time_s,
            measured_per_predicted=closed.measured_per_predicted,
            experts=closed.experts,
        )

    def totals(self) -> Totals:
        """A consistent copy of the counters."""
        with self._lock:
            self._add_steps()
            return Totals(*(getattr(self._totals, counter.name) for counter in fields(Totals)))


Key = TypeVar("Key")
Part = TypeVar("Part")


def _of(parts: dict[Key, Part], key: Key, create: Callable[[], Part]) -> Part:
    part = parts.get(key)
    if part is None:
        part = parts[key] = create()
    return part
