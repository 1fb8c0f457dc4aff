"""Sliding-window aggregation: the StepWindows of all replicas of one model become one Observation.

Windows are folded into panes of equal width as they arrive, so memory and the cost of an observation depend on the
number of panes and not on that of replicas. What a replica reported before it left stays evidence until it ages out.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from controller.panes import Pane
from controller.reports import Hello, PhaseWindow, StepWindow
from controller.trust import Trust
from controller.types import Observation, Phase, PhaseObservation, QualitySpent

MAX_REMEMBERED_REPLICAS = 4096  # whose last sequence number and trust outlive their stream
PANES_PER_WINDOW = 20


class Verdict(StrEnum):
    """What became of a window."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"  # the sequence number was seen last
    OUT_OF_ORDER = "out_of_order"  # a newer one was seen before
    WRONG_LIFE = "wrong_life"  # of another incarnation than the replica's Hello, or of no connected replica
    TOO_LONG = "too_long"  # covers more than the law's window: its gauges and its loss count, its samples do not
    NONSENSE = "nonsense"  # a message that cannot be true
    QUARANTINED = "quarantined"  # sound, but its replica is not believed yet: see trust.py


@dataclass(slots=True)
class Replica:
    """What is known of one connected replica."""

    hello: Hello
    joined_at_s: float
    last: StepWindow | None = None  # the newest that was believed
    last_at_s: float | None = None
    trust: Trust = field(default_factory=Trust)

    def age_s(self, now_s: float) -> float:
        """Seconds since it last reported, or joined."""
        return now_s - (self.joined_at_s if self.last_at_s is None else self.last_at_s)


@dataclass(slots=True)
class _Memory:
    """What is known of a replica beyond its stream's end."""

    incarnation: int
    sequence: int = 0
    trust: Trust = field(default_factory=Trust)


class ModelWindow:
    """All that the replicas of one model reported in the last ``window_s`` seconds. No clock: time is an argument."""

    def __init__(self, window_s: float, stale_after_s: float) -> None:
        self._window_s = window_s
        self._stale_after_s = stale_after_s
        self._pane_s = window_s / PANES_PER_WINDOW
        self._panes: deque[Pane] = deque(maxlen=PANES_PER_WINDOW + 1)
        self._memory: OrderedDict[str, _Memory] = OrderedDict()  # replica_id |-> its newest life
        self._spent: dict[str, QualitySpent] = {}
        self._observed_s = 0.0
        self._evidence_at_s: float | None = None
        self.replicas: dict[str, Replica] = {}
        self.num_windows: dict[Verdict, int] = dict.fromkeys(Verdict, 0)

    def join(self, hello: Hello, now_s: float) -> None:
        if self._evidence_at_s is None:
            self._evidence_at_s = now_s  # from now on its absence means something
        self.replicas[hello.replica_id] = Replica(hello, now_s, trust=self._recall(hello.replica_id, hello).trust)

    def leave(self, replica_id: str) -> None:
        self.replicas.pop(replica_id, None)

    def offer(self, window: StepWindow, now_s: float) -> Verdict:
        """Take a window in, unless its place in the replica's life or what it said before speaks against it."""
        replica = self.replicas.get(window.replica_id)
        if replica is None or replica.hello.incarnation != window.incarnation:
            return self._count(Verdict.WRONG_LIFE)
        memory = self._recall(window.replica_id, replica.hello)
        if window.sequence <= memory.sequence:
            self._judge(replica, memory, is_sound=False)
            is_last = window.sequence == memory.sequence
            return self._count(Verdict.DUPLICATE if is_last else Verdict.OUT_OF_ORDER)
        memory.sequence = window.sequence
        self._judge(replica, memory, is_sound=True)
        replica.last_at_s = now_s
        if not replica.trust.is_trusted:
            return self._count(Verdict.QUARANTINED)
        replica.last = window
        self._charge(window)
        if any(phase.num_steps for phase in window.phases.values()):
            self._evidence_at_s = now_s
        if window.window_s > self._window_s:
            return self._count(Verdict.TOO_LONG)
        self._pane(now_s).add(window)
        return self._count(Verdict.ACCEPTED)

    def refuse(self, replica_id: str) -> None:
        """The replica sent something that could not be true."""
        replica = self.replicas.get(replica_id)
        if replica is not None:
            self._judge(replica, self._recall(replica_id, replica.hello), is_sound=False)
        self._count(Verdict.NONSENSE)

    def observe(self, now_s: float, window_s: float | None = None) -> Observation:
        """Everything known at ``now_s``, with samples of the last ``window_s`` (default: all that is kept)."""
        seen = self.samples(now_s, window_s)
        requests = seen.requests.value()
        hellos = [replica.hello for replica in self.replicas.values()]
        fresh = self.fresh(now_s)
        ratio = seen.measured_per_predicted.value()
        return Observation(
            num_replicas=len(hellos),
            num_stale=len(hellos) - sum(not self.is_stale(replica, now_s) for replica in self.replicas.values()),
            num_quarantined=sum(not replica.trust.is_trusted for replica in self.replicas.values()),
            num_levels=min((hello.num_levels for hello in hellos), default=1),
            ladder_measured=bool(hellos) and all(hello.ladder_measured for hello in hellos),
            level_loss=_worst_losses(hellos),
            evidence_age_s=None if self._evidence_at_s is None else now_s - self._evidence_at_s,
            prefill=_observe_phase(seen.phases[Phase.PREFILL].value()),
            decode=_observe_phase(seen.phases[Phase.DECODE].value()),
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
            routed_pairs=seen.routed_pairs,
            dimmed_pairs=seen.dimmed_pairs,
            level_now=sum(w.level_decode for w in fresh) / len(fresh) if fresh else 0.0,
            level_peak_now=max((max(w.level_prefill, w.level_decode) for w in fresh), default=0),
            measured_per_predicted_p50=ratio.quantile(0.5),
            measured_per_predicted_p90=ratio.quantile(0.9),
            spent=dict(self._spent),
            observed_s=self._observed_s,
        )

    def samples(self, now_s: float, window_s: float | None = None) -> Pane:
        """The sum of the last ``window_s`` (default: all that is kept)."""
        oldest_s = now_s - min(window_s or self._window_s, self._window_s)
        return Pane.merged(pane for pane in self._panes if pane.start_s + self._pane_s > oldest_s)

    def fresh(self, now_s: float) -> list[StepWindow]:
        """The newest window of each replica that is believed and not overdue."""
        return [r.last for r in self.replicas.values() if r.last is not None and not self.is_stale(r, now_s)]

    def is_stale(self, replica: Replica, now_s: float) -> bool:
        return not replica.trust.is_trusted or replica.age_s(now_s) > self._stale_after_s

    def _recall(self, replica_id: str, hello: Hello) -> _Memory:
        """What is remembered of this life of the replica."""
        memory = self._memory.get(replica_id)
        return memory if memory and memory.incarnation == hello.incarnation else _Memory(hello.incarnation)

    def _judge(self, replica: Replica, memory: _Memory, is_sound: bool) -> None:
        replica.trust = memory.trust = memory.trust.after(is_sound)
        if not replica.trust.is_trusted:
            replica.last = None
        self._memory[replica.hello.replica_id] = memory
        self._memory.move_to_end(replica.hello.replica_id)
        if len(self._memory) > MAX_REMEMBERED_REPLICAS:
            self._memory.popitem(last=False)

    def _charge(self, window: StepWindow) -> None:
        self._observed_s += window.window_s
        for service_class, part in window.classes.items():
            spent = self._spent.get(service_class, QualitySpent())
            self._spent[service_class] = QualitySpent(
                spent.num_tokens + part.num_tokens, spent.loss_nats + part.loss_nats
            )

    def _pane(self, now_s: float) -> Pane:
        start_s = now_s // self._pane_s * self._pane_s
        if not self._panes or self._panes[-1].start_s < start_s:
            self._panes.append(Pane(start_s))
        return self._panes[-1]

    def _count(self, verdict: Verdict) -> Verdict:
        self.num_windows[verdict] += 1
        return verdict


def _worst_losses(hellos: Sequence[Hello]) -> tuple[float, ...]:
    if not hellos or not all(hello.level_loss for hello in hellos):
        return ()
    num_levels = min(hello.num_levels for hello in hellos)
    return tuple(max(hello.level_loss[level] for hello in hellos) for level in range(num_levels))


def _observe_phase(window: PhaseWindow) -> PhaseObservation:
    return PhaseObservation(
        num_steps=window.num_steps,
        num_tokens=window.num_tokens,
        step_time_p50_s=window.step_time_s.quantile(0.5),
        step_time_p90_s=window.step_time_s.quantile(0.9),
        level_mean=window.level_tokens / window.num_tokens if window.num_tokens else 0.0,
        level_peak=window.level_peak,
    )
