"""Sums of StepWindows: what one pane of the sliding window holds. Adding a window costs what that window holds."""

from __future__ import annotations

from collections.abc import Iterable

from controller.reports import ClassWindow, PhaseWindow, ShapeWindow, StepWindow
from controller.sketch import SketchSum
from controller.types import Phase


class PhaseSum:
    """A PhaseWindow that grows."""

    def __init__(self) -> None:
        self.num_steps = self.num_tokens = self.level_tokens = self.level_peak = 0
        self.step_time_s = SketchSum()
        self._shape_steps: dict[int, int] = {}
        self._shape_times_s: dict[int, float] = {}

    def add(self, window: PhaseWindow) -> None:
        self.num_steps += window.num_steps
        self.num_tokens += window.num_tokens
        self.level_tokens += window.level_tokens
        if window.level_peak > self.level_peak:
            self.level_peak = window.level_peak
        self.step_time_s.add(window.step_time_s)
        steps, times_s = self._shape_steps, self._shape_times_s
        for log2_tokens, shape in window.shapes.items():
            steps[log2_tokens] = steps.get(log2_tokens, 0) + shape.num_steps
            times_s[log2_tokens] = times_s.get(log2_tokens, 0.0) + shape.step_time_s

    @property
    def shapes(self) -> dict[int, ShapeWindow]:
        return {size: ShapeWindow(steps, self._shape_times_s[size]) for size, steps in self._shape_steps.items()}

    def value(self) -> PhaseWindow:
        """What it holds, as a view: read it before the next `add`."""
        return PhaseWindow(
            self.num_steps,
            self.num_tokens,
            self.level_tokens,
            self.level_peak,
            self.step_time_s.value(),
            self.shapes,
        )


class ClassSum:
    """A ClassWindow that grows."""

    def __init__(self) -> None:
        self.num_finished = self.num_failed = self.num_ttft_ok = self.num_tpot_ok = self.num_tokens = 0
        self.loss_nats = 0.0
        self.queue_wait_s, self.ttft_s, self.tpot_s = SketchSum(), SketchSum(), SketchSum()

    def add(self, window: ClassWindow) -> None:
        self.num_finished += window.num_finished
        self.num_failed += window.num_failed
        self.num_ttft_ok += window.num_ttft_ok
        self.num_tpot_ok += window.num_tpot_ok
        self.num_tokens += window.num_tokens
        self.loss_nats += window.loss_nats
        self.queue_wait_s.add(window.queue_wait_s)
        self.ttft_s.add(window.ttft_s)
        self.tpot_s.add(window.tpot_s)

    def value(self) -> ClassWindow:
        """What it holds, as a view: read it before the next `add`."""
        return ClassWindow(
            self.num_finished,
            self.num_failed,
            self.num_ttft_ok,
            self.num_tpot_ok,
            self.queue_wait_s.value(),
            self.ttft_s.value(),
            self.tpot_s.value(),
            self.num_tokens,
            self.loss_nats,
        )


class Pane:
    """The sum of all windows that arrived in [start_s, start_s + pane width)."""

    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.phases = {phase: PhaseSum() for phase in Phase}
        self.requests = ClassSum()
        self.measured_per_predicted = SketchSum()
        self.routed_pairs = self.dimmed_pairs = 0

    def add(self, window: StepWindow) -> None:
        for phase, part in window.phases.items():
            self.phases[phase].add(part)
        for requests in window.classes.values():
            self.requests.add(requests)
        self.measured_per_predicted.add(window.measured_per_predicted)
        self.routed_pairs += window.routed_pairs
        self.dimmed_pairs += window.dimmed_pairs

    @staticmethod
    def merged(panes: Iterable[Pane]) -> Pane:
        """One pane of all, from the first one's start on."""
        whole = Pane(float("-inf"))
        for pane in panes:
            for phase in Phase:
                whole.phases[phase].add(pane.phases[phase].value())
            whole.requests.add(pane.requests.value())
            whole.measured_per_predicted.add(pane.measured_per_predicted.value())
            whole.routed_pairs += pane.routed_pairs
            whole.dimmed_pairs += pane.dimmed_pairs
        return whole
