"""Sliding-window aggregation: the StepWindows of all replicas of one model become one Observation.

Windows are folded into panes of equal width as they arrive, so memory and the cost of an observation depend on the
number of panes and not on that of replicas. What a replica reported before it left stays evidence until it ages out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import StrEnum

from controller.reports import ClassWindow, Hello, PhaseWindow, StepWindow
from controller.types import Observation, Phase, PhaseObservation

MAX_REMEMBERED_REPLICAS = 4096  # whose last sequence number outlives their stream
PANES_PER_WINDOW = 20


class Verdict(StrEnum):
    """What became of a window."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the sequence number was seen last
    OUT_OF_ORDER = "out_of_order"  # a newer one was seen before
    WRONG_LIFE = "wrong_life"  # of another incarnation than the replica's Hello, or of no connected replica
    TOO_LONG = "too_long"  # covers more than the law's window: its gauges count, its samples do not


@dataclass(slots=True)
class Replica:
    """What is known of one connected replica."""

    hello: Hello
    joined_at_s: float
    last: StepWindow | None = None
    last_at_s: float | None = None

    def age_s(self, now_s: float) -> float:
        """Seconds since it last reported, or joined."""
        return now_s - (self.joined_at_s if self.last_at_s is None else self.last_at_s)


@dataclass(frozen=True, slots=True)
class _Pane:
    """The sum of all windows that arrived in [start_s, start_s + pane width)."""

    start_s: float
    prefill: PhaseWindow = field(default_factory=PhaseWindow)
    decode: PhaseWindow = field(default_factory=PhaseWindow)
    requests: ClassWindow = field(default_factory=ClassWindow)
    routed_pairs: int = 0
    dimmed_pairs: int = 0

    def plus(self, window: StepWindow) -> _Pane:
        return _Pane(
            start_s=self.start_s,
            prefill=PhaseWindow.merged((self.prefill, window.phases.get(Phase.PREFILL, PhaseWindow()))),
            decode=PhaseWindow.merged((self.decode, window.phases.get(Phase.DECODE, PhaseWindow()))),
            requests=ClassWindow.merged((self.requests, *window.classes.values())),
            routed_pairs=self.routed_pairs + window.routed_pairs,
            dimmed_pairs=self.dimmed_pairs + window.dimmed_pairs,
        )


class ModelWindow:
    """All that the replicas of one model reported in the last ``window_s`` seconds. No clock: time is an argument."""

    def __init__(self, window_s: float, stale_after_s: float) -> None:
        self._window_s = window_s
        self._stale_after_s = stale_after_s
        self._pane_s = window_s / PANES_PER_WINDOW
        self._panes: deque[_Pane] = deque(maxlen=PANES_PER_WINDOW + 1)
        self._last_sequence: OrderedDict[str, tuple[int, int]] = OrderedDict()  # replica_id |-> incarnation, sequence
        self.replicas: dict[str, Replica] = {}
        self.num_windows: dict[Verdict, int] = dict.fromkeys(Verdict, 0)

    def join(self, hello: Hello, now_s: float) -> None:
        self.replicas[hello.replica_id] = Replica(hello, now_s)

    def leave(self, replica_id: str) -> None:
        self.replicas.pop(replica_id, None)

    def offer(self, window: StepWindow, now_s: float) -> Verdict:
        """Take a window in, unless its place in the replica's life says that it was counted already."""
        verdict = self._judge(window)
        self.num_windows[verdict] += 1
        if verdict in (Verdict.ACCEPTED, Verdict.TOO_LONG):
            self._remember(window)
            replica = self.replicas[window.replica_id]
            replica.last, replica.last_at_s = window, now_s
        if verdict is Verdict.ACCEPTED:
            self._add(window, now_s)
        return verdict

    def observe(self, now_s: float, window_s: float | None = None) -> Observation:
        """Everything known at ``now_s``, with samples of the last ``window_s`` (default: all that is kept)."""
        oldest_s = now_s - min(window_s or self._window_s, self._window_s)
        panes = [pane for pane in self._panes if pane.start_s + self._pane_s > oldest_s]
        requests = ClassWindow.merged(pane.requests for pane in panes)
        hellos = [replica.hello for replica in self.replicas.values()]
        stale = [self.is_stale(replica, now_s) for replica in self.replicas.values()]
        fresh = [r.last for r, is_stale in zip(self.replicas.values(), stale, strict=True) if r.last and not is_stale]
        return Observation(
            num_replicas=len(hellos),
            num_stale=sum(stale),
            num_levels=min((hello.num_levels for hello in hellos), default=1),
            ladder_measured=bool(hellos) and all(hello.ladder_measured for hello in hellos),
            prefill=_observe_phase(PhaseWindow.merged(pane.prefill for pane in panes)),
            decode=_observe_phase(PhaseWindow.merged(pane.decode for pane in panes)),
            num_finished=requests.num_finished,
            num_failed=requests.num_failed,
            ttft_p50_s=requests.ttft_s.quantile(0.5),
            ttft_p90_s=requests.ttft_s.quantile(0.9),
            ttft_p99_s=requests.ttft_s.quantile(0.99),
            tpot_p50_s=requests.tpot_s.quantile(0.5),
            tpot_p90_s=requests.tpot_s.quantile(0.9),
            tpot_p99_s=requests.tpot_s.quantile(0.99),
            queue_wait_p90_s=requests.queue_wait_s.quantile(0.9),
            num_running=sum(w.num_running for w in fresh),
            num_waiting=sum(w.num_waiting for w in fresh),
            queued_prefill_tokens=sum(w.queued_prefill_tokens for w in fresh),
            oldest_wait_s=max((w.oldest_wait_s for w in fresh), default=0.0),
            kv_used_frac=max((w.kv_used_frac for w in fresh), default=0.0),
            routed_pairs=sum(pane.routed_pairs for pane in panes),
            dimmed_pairs=sum(pane.dimmed_pairs for pane in panes),
            level_now=sum(w.level_decode for w in fresh) / len(fresh) if fresh else 0.0,
            level_peak_now=max((max(w.level_prefill, w.level_decode) for w in fresh), default=0),
        )

    def is_stale(self, replica: Replica, now_s: float) -> bool:
        return replica.age_s(now_s) > self._stale_after_s

    def _judge(self, window: StepWindow) -> Verdict:
        replica = self.replicas.get(window.replica_id)
        if replica is None or replica.hello.incarnation != window.incarnation:
            return Verdict.WRONG_LIFE
        incarnation, sequence = self._last_sequence.get(window.replica_id, (window.incarnation, 0))
        if incarnation == window.incarnation and window.sequence <= sequence:
            return Verdict.DUPLICATE if window.sequence == sequence else Verdict.OUT_OF_ORDER
        return Verdict.TOO_LONG if window.window_s > self._window_s else Verdict.ACCEPTED

    def _remember(self, window: StepWindow) -> None:
        self._last_sequence[window.replica_id] = (window.incarnation, window.sequence)
        self._last_sequence.move_to_end(window.replica_id)
        if len(self._last_sequence) > MAX_REMEMBERED_REPLICAS:
            self._last_sequence.popitem(last=False)

    def _add(self, window: StepWindow, now_s: float) -> None:
        start_s = now_s // self._pane_s * self._pane_s
        if not self._panes or self._panes[-1].start_s < start_s:
            self._panes.append(_Pane(start_s))
        self._panes[-1] = self._panes[-1].plus(window)


def _observe_phase(window: PhaseWindow) -> PhaseObservation:
    return PhaseObservation(
        num_steps=window.num_steps,
        num_tokens=window.num_tokens,
        step_time_p50_s=window.step_time_s.quantile(0.5),
        step_time_p90_s=window.step_time_s.quantile(0.9),
        level_mean=window.level_tokens / window.num_tokens if window.num_tokens else 0.0,
        level_peak=window.level_peak,
    )
