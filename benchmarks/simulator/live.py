"""The live engine that the simulator is compared with: the same traffic, on the CPU time of this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import Progress

from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.simulator.traffic import Traffic
from benchmarks.workloads.lengths import draw_prompt
from engine.brownout import Brownout
from engine.engine import Engine
from engine.governor import step_time_for_queue_s
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.types import BrownoutSetting, GenerationRequest, Levels, PhaseSetting, RequestOutput, SamplingParams

MARGINS = {"ttft_margin": 0.5, "tpot_margin": 0.92, "max_shift": 0.0}  # of law "predictive", never shifted
STEPS_PER_LEVEL = 5  # before the next level has its turn


class CpuClock:
    """Seconds of CPU time of this process since it was made, plus the idle time that was skipped."""

    def __init__(self) -> None:
        self._skipped_s = -time.process_time()

    def __call__(self) -> float:
        return self._skipped_s + time.process_time()

    def skip_to(self, at_s: float) -> None:
        self._skipped_s += max(0.0, at_s - self())


class CpuTimedBrownout(Brownout):
    """Learns each step's time on the engine's clock, from choosing its level to its end, instead of the wall's."""

    _chosen_at_s = 0.0

    def choose(self, scheduler: Scheduler, batch: ScheduledBatch, now_s: float) -> Levels:
        self._chosen_at_s = now_s
        return super().choose(scheduler, batch, now_s)

    def learn_step(self, batch: ScheduledBatch, levels: Levels, step_time_s: float, now_s: float) -> None:
        super().learn_step(batch, levels, now_s - self._chosen_at_s, now_s)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What the live engine did."""

    records: tuple[RequestRecord, ...]
    levels: tuple[tuple[float, int], ...]  # (time, level) at each change
    reaction_s: float | None  # from the queue's first signal to the first dimmed step
    steps: tuple[tuple[int, int, float], ...]  # (level, tokens, seconds)
    loss_nats: float


def governed(engine: Engine) -> BrownoutSetting:
    """What the law decides throughout when its margins never shift."""
    top, slo = engine.info.num_levels - 1, engine.config.slo
    return BrownoutSetting(
        prefill=PhaseSetting(0, top, slo.ttft_s, MARGINS["ttft_margin"]),
        decode=PhaseSetting(0, top, slo.tpot_s, MARGINS["tpot_margin"]),
        law="predictive",
    )


def run_live(
    engine: Engine,
    clock: CpuClock,
    traffic: Traffic,
    loss: Sequence[float],
    seed: int,
    progress: Progress,
    each_level: bool = False,
) -> LiveRun:
    """Plays the traffic on the engine's clock; requests enter between two steps, as in serving.

    ``each_level``: instead of being governed, each level runs STEPS_PER_LEVEL steps in turn.
    """
    rng = np.random.default_rng(seed)
    engine.apply_setting(governed(engine))
    prompts = [draw_prompt(r.num_prompt, engine.info.vocab_size, rng) for r in traffic.requests]
    pending = list(enumerate(traffic.requests))[::-1]
    seen = _Seen(engine, traffic, loss)
    task = progress.add_task("live engine", total=len(prompts))
    start_s = clock()
    while len(seen.records) < len(prompts):
        now_s = clock() - start_s
        while pending and pending[-1][1].at_s <= now_s:
            index, request = pending.pop()
            sampling = SamplingParams(max_tokens=request.num_output, temperature=0.0, ignore_eos=True)
            waited_s = now_s - request.at_s
            engine.add(GenerationRequest(str(index), prompts[index], sampling, waited_s=waited_s))
        if not engine.has_work:
            clock.skip_to(start_s + pending[-1][1].at_s)
            continue
        if each_level:
            level = len(seen.steps) // STEPS_PER_LEVEL % engine.info.num_levels
            engine.apply_setting(BrownoutSetting.pinned(level))
        outputs = engine.step()
        ended_s = clock() - start_s
        seen.step(now_s, ended_s)
        seen.take(outputs, ended_s)
        progress.update(task, completed=len(seen.records))
    return seen.run()


class _Seen:
    """Grows step by step into a LiveRun."""

    def __init__(self, engine: Engine, traffic: Traffic, loss: Sequence[float]) -> None:
        self._engine = engine
        self._traffic = traffic
        self._loss = loss
        self._first_s: dict[str, float] = {}
        self._levels: list[tuple[float, int]] = []
        self._signal_s: float | None = None
        self._reaction_s: float | None = None
        self._loss_nats = 0.0
        self.records: list[RequestRecord] = []
        self.steps: list[tuple[int, int, float]] = []

    def step(self, began_s: float, ended_s: float) -> None:
        brownout = self._engine.brownout
        level, num_tokens = brownout.levels.peak, brownout.observation.num_tokens
        self.steps.append((level, num_tokens, ended_s - began_s))
        if not self._levels or self._levels[-1][1] != level:
            self._levels.append((began_s, level))
        self._loss_nats += self._loss[level] * num_tokens
        if self._signal_s is None and self._queue_asks():
            self._signal_s = began_s
        if self._signal_s is not None and self._reaction_s is None and level > 0:
            self._reaction_s = began_s - self._signal_s

    def _queue_asks(self) -> bool:
        """Whether the promise could not be kept at level 0, as the governor sees it."""
        slo, top = self._engine.config.slo, self._engine.info.num_levels - 1
        governor, observed = self._engine.brownout.governor, self._engine.brownout.observation
        promise = PhaseSetting(0, top, slo.ttft_s, 1.0)
        chunk_s, step_s = step_time_for_queue_s(promise, observed, governor.mean_output_tokens)
        return governor.smoothed_s[0] > step_s or governor.model.predict_s(0, observed.max_num_batched_tokens) > chunk_s

    def take(self, outputs: Sequence[RequestOutput], ended_s: float) -> None:
        for output in outputs:
            first_s = self._first_s.setdefault(output.request_id, ended_s)
            if output.finish_reason is None:
                continue
            request = self._traffic.requests[int(output.request_id)]
            self.records.append(
                RequestRecord(
                    request.at_s,
                    request.at_s,
                    Outcome.COMPLETED,
                    first_s,
                    ended_s,
                    request.num_prompt,
                    request.num_output,
                )
            )

    def run(self) -> LiveRun:
        dimmed_unasked = self._signal_s is None and any(level for _, level in self._levels)
        reaction_s = 0.0 if dimmed_unasked else self._reaction_s
        return LiveRun(tuple(self.records), tuple(self._levels), reaction_s, tuple(self.steps), self._loss_nats)
