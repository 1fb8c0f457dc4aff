"""One simulated replica: the live scheduler, block manager, governor and telemetry around a plant instead of a model.

It does what engine.engine.Engine does around its runner; requests that arrive during a step enter at its end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.simulator.events import EventLoop
from benchmarks.simulator.plant import Load, Plant
from benchmarks.simulator.traffic import Request
from engine.brownout import Brownout
from engine.config import EngineConfig
from engine.governor import step_time_for_queue_s
from engine.kv_cache.blocks import BlockManager
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.scheduler.sequence import Sequence
from engine.stats import stats_of
from engine.step_profile import profiled_token_counts
from engine.step_time import StepTimeModel
from engine.telemetry import StepRecord, StepWindow, TelemetryRecorder
from engine.types import (
    BrownoutSetting,
    EngineBusyError,
    EngineStats,
    GenerationRequest,
    Levels,
    PhaseSetting,
    SamplingParams,
    ServiceClass,
)

VOCAB_SIZE = 1 << 17
PAIRS_PER_TOKEN = 4 * 24  # routed (token, expert) pairs of Qwen1.5-MoE-A2.7B


@dataclass(slots=True)
class ReplicaLog:
    """What happened on one replica, for the figures and the plots."""

    records: list[RequestRecord] = field(default_factory=list)
    levels: list[tuple[float, int]] = field(default_factory=list)  # (time, level) at each change
    loss_nats: float = 0.0  # summed over computed tokens
    num_tokens: int = 0
    num_steps: int = 0
    signal_s: float | None = None  # first time that the queue said: at level 0 the promise will break
    reaction_s: float | None = None  # from then to the first dimmed step; 0: already dimmed


class SimulatedReplica:
    """Steps by itself on the event loop whenever it has work."""

    def __init__(
        self,
        replica_id: str,
        config: EngineConfig,
        plant: Plant,
        profile: StepTimeModel,
        loss_by_level: tuple[float, ...],
        num_blocks: int,
        events: EventLoop,
    ) -> None:
        self.replica_id = replica_id
        self._config = config
        self._plant = plant
        self._loss = loss_by_level
        self._events = events
        blocks = BlockManager(num_blocks, config.cache.block_size, config.cache.prefix_caching)
        self.scheduler = Scheduler(config.scheduler, blocks, num_blocks * config.cache.block_size, VOCAB_SIZE)
        self.brownout = Brownout(profile, config, may_dim=True)
        self.recorder = TelemetryRecorder(config.slo, events.now_s)
        self.log = ReplicaLog()
        self._inbox: list[tuple[GenerationRequest, float]] = []
        self._stepping = False
        self._num_preemptions = 0
        self._promise = PhaseSetting(0, plant.num_levels - 1, config.slo.ttft_s, 1.0)

    # What the cluster does with it

    def submit(self, request_id: str, request: Request) -> None:
        """A request that its client sent at ``request.at_s`` has reached the replica."""
        sampling = SamplingParams(max_tokens=request.num_output, temperature=0.0, ignore_eos=True)
        service_class = ServiceClass.FULL if request.full else ServiceClass.STANDARD
        generation = GenerationRequest(request_id, (0,) * request.num_prompt, sampling, service_class)
        self._inbox.append((generation, request.at_s))
        if not self._stepping:
            self._begin_step()

    def apply(self, setting: BrownoutSetting) -> None:
        self.brownout.apply(setting, self._events.now_s)

    def take_window(self) -> StepWindow:
        governor = self.brownout.governor
        return self.recorder.drain(
            self.stats(),
            self._events.now_s,
            applied_epoch=self.brownout.newest.epoch,
            trim=governor.model.trim,
            predicted_step_time_s=governor.smoothed_s,
        )

    def stats(self) -> EngineStats:
        return stats_of(self.scheduler, self.brownout, self._events.now_s, self._num_preemptions)

    # The step

    def _begin_step(self) -> None:
        now_s = self._events.now_s
        for request, at_s in self._inbox:
            self._add(Sequence(request, at_s), now_s)
        self._inbox.clear()
        batch = self.scheduler.schedule(now_s)
        self._num_preemptions += batch.num_preempted
        self.recorder.record_preemption(batch.num_preempted)
        self._stepping = bool(batch)
        if not batch:
            return
        levels = self.brownout.choose(self.scheduler, batch, now_s)
        self.scheduler.launch(batch)
        load = _load_of(batch)
        self._watch(load, levels, now_s)
        step_s = self._plant.step_s(load, levels.prefill, levels.decode)
        self._events.at(now_s + step_s, lambda: self._end_step(batch, load, levels, step_s))

    def _add(self, sequence: Sequence, now_s: float) -> None:
        try:
            self.scheduler.add(sequence)
        except EngineBusyError:
            self.log.records.append(RequestRecord(sequence.arrival_s, sequence.arrival_s, Outcome.REJECTED))
        else:
            self.brownout.learn_arrival(now_s)

    def _end_step(self, batch: ScheduledBatch, load: Load, levels: Levels, step_s: float) -> None:
        self.scheduler.commit(batch, levels)
        predicted_s = self.brownout.predict_step_s(batch, levels)
        self.brownout.learn_step(batch, levels, step_s, self._events.now_s)
        spent: dict[ServiceClass, tuple[int, float]] = {}
        self.log.num_steps += 1
        self.log.num_tokens += load.num_tokens
        for item in batch:
            sequence = item.sequence
            level = 0 if sequence.exact else levels.of(item.phase)
            sequence.level_tokens += item.num_tokens * level
            sequence.level_peak = max(sequence.level_peak, level)
            sequence.computed_tokens += item.num_tokens
            service_class = sequence.request.service_class
            num_tokens, loss_nats = spent.get(service_class, (0, 0.0))
            spent[service_class] = num_tokens + item.num_tokens, loss_nats + item.num_tokens * self._loss[level]
            if item.samples:
                self._append_token(sequence)
        self.log.loss_nats += sum(loss_nats for _, loss_nats in spent.values())
        self.recorder.record_step(
            StepRecord(
                batch.num_prefill_tokens,
                batch.num_decode_tokens,
                levels,
                step_s,
                predicted_s,
                load.num_tokens * PAIRS_PER_TOKEN,
                spent=spent,
            )
        )
        self._begin_step()

    def _append_token(self, sequence: Sequence) -> None:
        now_s = self._events.now_s
        sequence.append(0)
        sequence.last_token_s = now_s
        service_class = sequence.request.service_class
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            admitted_s = sequence.admitted_s if sequence.admitted_s is not None else now_s
            self.recorder.record_first_token(service_class, now_s - sequence.arrival_s, admitted_s - sequence.arrival_s)
        if sequence.num_generated < sequence.request.sampling.max_tokens:
            return
        self.scheduler.remove(sequence)
        self.brownout.learn_finish(sequence.num_generated)
        record = RequestRecord(
            sequence.arrival_s,
            sequence.arrival_s,
            Outcome.COMPLETED,
            sequence.first_token_s,
            now_s,
            sequence.num_prompt,
            sequence.num_generated,
            sequence.usage().brownout,
        )
        self.recorder.record_finish(service_class, record.tpot_s if sequence.num_generated > 1 else None)
        self.log.records.append(record)

    def _watch(self, load: Load, levels: Levels, now_s: float) -> None:
        """Notes level changes, and how long the first dimming came after the queue had asked for it."""
        log = self.log
        if not log.levels or log.levels[-1][1] != levels.peak:
            log.levels.append((now_s, levels.peak))
        if log.reaction_s is not None:
            return
        if log.signal_s is None:
            tokens = self.brownout.governor.mean_output_tokens
            chunk_s, step_s = step_time_for_queue_s(self._promise, self.brownout.observation, tokens)
            full_chunk = Load(num_prefill_tokens=self._config.scheduler.max_num_batched_tokens)
            if self._plant.step_s(load, 0, 0) > step_s or self._plant.step_s(full_chunk, 0, 0) > chunk_s:
                log.signal_s = now_s
        if log.signal_s is not None and levels.peak > 0:
            log.reaction_s = now_s - log.signal_s


def profile_of(plant: Plant, config: EngineConfig, error: float) -> StepTimeModel:
    """What start-up profiling would have measured on a plant, times ``error``."""
    token_counts = profiled_token_counts(config.scheduler)
    times_s = [[error * t for t in row] for row in _times_s(plant, token_counts)]
    return StepTimeModel.fit(token_counts, times_s)


def _times_s(plant: Plant, token_counts: tuple[int, ...]) -> list[list[float]]:
    """Rows of decode tokens with short contexts, as the profiler makes them."""
    return [
        [plant.step_s(Load(num_decodes=n), level, level) for n in token_counts] for level in range(plant.num_levels)
    ]


def _load_of(batch: ScheduledBatch) -> Load:
    return Load(
        num_decodes=batch.num_decode_tokens,
        num_prefill_tokens=batch.num_prefill_tokens,
        num_exact=sum(item.num_tokens for item in batch if item.sequence.exact),
        context_tokens=sum(len(item.sequence.token_ids) for item in batch.decodes),
    )
