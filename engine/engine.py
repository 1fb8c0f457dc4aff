"""One replica's inference engine; read this file first.

A step: schedule a batch, let the governor choose its brownout level, run it, hand out what it produced. On a GPU
steps overlap: the next one is launched before the last one's tokens are known, so the card never waits for the host.

    engine = Engine(EngineConfig(ModelConfig("path/of/a/model")))
    engine.add(GenerationRequest("a", tuple(engine.tokenizer.encode("Hello"))))
    while engine.has_work:
        for output in engine.step():
            print(output.text)

Not thread-safe: one thread owns it. `engine.async_engine` runs it in a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from engine.brownout import Brownout, spent_by_class
from engine.config import EngineConfig
from engine.kv_cache.blocks import BlockManager
from engine.level_log import LevelChange, LevelLog
from engine.moe.swap import SwapPlan, UnitedSwap, plan_swap
from engine.pool.slots import ModelSlot, load_slot
from engine.request_log import RequestLog
from engine.request_state import RequestState
from engine.runner import LaunchedStep, Runner, StepResult
from engine.sampling.grammar import GrammarCompiler, GrammarState
from engine.scheduler.scheduler import ScheduledBatch, Scheduler
from engine.stats import stats_of
from engine.step_profile import profile_steps
from engine.telemetry import StepRecord, TelemetryRecorder
from engine.text.tokenizer import load_tokenizer
from engine.types import (
    BrownoutSetting,
    EngineStats,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    Levels,
    ModelInfo,
    RequestOutput,
)

EXPERT_LOAD_PERIOD_S = 1.0  # nobody decides on it in a hurry


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    batch: ScheduledBatch
    levels: Levels
    launched: LaunchedStep
    setting_version: int


class Engine:
    """Loads a model and serves it. Raises ConfigError or CheckpointError when it cannot."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self._clock = clock
        self.tokenizer = load_tokenizer(config.model.path)
        slot = load_slot(config)
        self._runner: Runner | None = Runner(slot, config.scheduler.max_num_seqs)
        blocks = BlockManager(slot.kv.num_blocks, slot.kv.block_size, config.cache.prefix_caching)
        self.scheduler = Scheduler(config.scheduler, blocks, slot.max_model_len, slot.spec.vocab_size)
        self.recorder = TelemetryRecorder(config.slo, clock())
        self.request_log = RequestLog()
        self.level_log = LevelLog()
        self._launched_s = clock()
        self._requests: dict[str, RequestState] = {}
        self._under_way: _StepUnderWay | None = None
        self._overlaps = slot.graphs is not None if config.overlap_steps is None else config.overlap_steps
        self._held_outputs: list[RequestOutput] = []
        self._num_needing_host = 0  # requests for which steps cannot overlap
        self._swap: UnitedSwap | None = None
        self.grammars = GrammarCompiler(self.tokenizer, slot.spec.vocab_size)
        self._pairs_per_token = slot.spec.pairs_per_token
        self._num_steps = self._num_tokens = self._num_preemptions = 0
        may_dim = slot.ladder.measured or config.brownout.allow_unmeasured
        model = profile_steps(self._runner, config, len(slot.ladder))
        self.brownout = Brownout(model, config, may_dim)
        if slot.counter is not None:
            slot.counter.reset_()  # the profile's steps
        self._experts_taken_s = clock()
        self.info = ModelInfo(
            name=config.model.served_name,
            vocab_size=slot.spec.vocab_size,
            max_model_len=slot.max_model_len,
            num_blocks=slot.kv.num_blocks,
            block_size=slot.kv.block_size,
            num_levels=len(slot.ladder),
            **self._ladder_info(),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
            step_time_s_by_level=tuple(
                model.predict_s(level, config.scheduler.max_num_seqs) for level in range(model.num_levels)
            ),
            device=str(slot.device),
        )

    # Requests

    @property
    def has_work(self) -> bool:
        """Whether a step would bring anything about."""
        waiting = bool(self._held_outputs) or self._swap is not None
        return waiting or (self._runner is not None and self.scheduler.has_work)

    def add(self, request: GenerationRequest, grammar: GrammarState | None = None) -> None:
        """Queue a request. Raises InvalidRequestError or EngineBusyError; then nothing has changed.

        ``grammar``: the request's, compiled by `grammars`; compiled here if it was not.
        """
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use", "request_id")
        if grammar is None and request.sampling.grammar is not None:
            grammar = self.grammars.compile(request.sampling.grammar)
        now_s = self._clock()
        state = RequestState(request, self.tokenizer, now_s - request.waited_s, self.info.vocab_size, grammar)
        self.scheduler.add(state.sequence)
        self._requests[request.request_id] = state
        self._num_needing_host += state.needs_host
        self.brownout.learn_arrival(now_s)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; None if it is not here any more."""
        state = self._requests.get(request_id)
        return self._finish(state, FinishReason.ABORT) if state else None

    def apply_setting(self, setting: BrownoutSetting) -> bool:
        """Put a setting in force from the next step on, or renew its lease; False if a newer one is in force."""
        return self.brownout.apply(setting, self._clock())

    # United experts

    def plan_swap(self, path: str, ladder: str = "", replaces: int | None = None) -> SwapPlan:
        """Check united experts for :meth:`swap_united`; any thread may. Raises ArtefactError or ConfigError."""
        if self._runner is None:
            raise RuntimeError("the engine has no model")
        slot = self._runner.slot
        return plan_swap(slot.dimming, self.config, slot.spec, path, ladder, replaces)

    def swap_united(self, plan: SwapPlan | str) -> UnitedSwap:
        """Replace united experts layer by layer between the coming steps; no request notices but by its quality.

        ``plan``: a plan or the path of united experts, which is then checked first. Raises ArtefactError or ConfigError
        with everything as it was, and RuntimeError while another swap is under way.
        """
        if self._runner is None or self._swap is not None:
            raise RuntimeError("the engine has no model, or is swapping united experts already")
        slot = self._runner.slot
        plan = self.plan_swap(plan) if isinstance(plan, str) else plan
        self._swap = UnitedSwap(plan, slot.dimming, slot.device)
        return self._swap

    def _advance_swap(self) -> None:
        """A layer for each step; all of them while there is nothing else to do."""
        while self._swap is not None:
            idle = not self.scheduler.has_work
            if self._swap.advance(wait=idle):
                self._swap = None
                self.info = replace(self.info, **self._ladder_info())
            elif not idle:
                return

    def _ladder_info(self) -> dict[str, Any]:
        """What ModelInfo says of the ladder."""
        assert self._runner is not None
        ladder = self._runner.slot.ladder
        return {"ladder_measured": ladder.measured, "level_names": ladder.names, "level_loss": ladder.losses}

    # Residency

    def leave(self) -> ModelSlot:
        """Give up the model between two steps; requests stay, and nothing here refers to the slot any more."""
        if self._runner is None:
            raise RuntimeError("the engine has no model to leave")
        self._held_outputs += self._finish_step()
        slot, self._runner = self._runner.slot, None
        return slot

    def take_up(self, slot: ModelSlot) -> None:
        """Go on with a slot that this engine left."""
        if self._runner is not None:
            raise RuntimeError("the engine already has a model")
        self._runner = Runner(slot, self.config.scheduler.max_num_seqs)

    # The step

    def step(self) -> list[RequestOutput]:
        """Run one step, or begin it and end the one before; returns what each request gained."""
        outputs, self._held_outputs = self._held_outputs, []
        if self._runner is None:
            return outputs
        self._advance_swap()
        if self._under_way is not None and not self._may_overlap():
            outputs += self._finish_step()
        launched = self._launch_step(self._runner)
        outputs += self._finish_step()
        self._under_way = launched
        if launched is not None and not self._may_overlap():
            outputs += self._finish_step()
        return outputs

    def _may_overlap(self) -> bool:
        """Not while the next token of a request in the batch depends on what the host makes of the last."""
        if not self._overlaps or not self._num_needing_host:
            return self._overlaps
        return not any(self._requests[s.request_id].sampling.needs_host for s in self.scheduler.running)

    def _launch_step(self, runner: Runner) -> _StepUnderWay | None:
        now_s = self._clock()
        batch = self.scheduler.schedule(now_s)
        self._num_preemptions += batch.num_preempted
        self.recorder.record_preemption(batch.num_preempted)
        if not batch:
            return None
        level_before = self.brownout.levels.peak
        levels = self.brownout.choose(self.scheduler, batch, now_s)
        self._note_level(level_before, levels.peak, now_s)
        states = [self._requests[item.sequence.request_id].sampling for item in batch]
        launched = runner.launch(batch, self.scheduler.blocks, levels, states)
        self.scheduler.launch(batch)
        return _StepUnderWay(batch, levels, launched, self.brownout.setting(now_s).version)

    def _note_level(self, before: int, level: int, now_s: float) -> None:
        since_launch_s, self._launched_s = now_s - self._launched_s, now_s
        if level != before:
            waits_s = [request.waited_s for request in self.brownout.observation.waiting]
            self.level_log.append(
                LevelChange(
                    at_s=time.time(),
                    level_before=before,
                    level=level,
                    since_launch_s=since_launch_s,
                    num_running=len(self.scheduler.running),
                    num_waiting=len(self.scheduler.waiting),
                    oldest_wait_s=max(waits_s, default=0.0),
                    setting_version=self.brownout.setting(now_s).version,
                )
            )

    def _finish_step(self) -> list[RequestOutput]:
        """Wait for the step under way, if any, and hand out what it produced."""
        step, self._under_way = self._under_way, None
        if step is None:
            return []
        result = step.launched.wait()
        self.scheduler.commit(step.batch, step.levels)
        self._record_step(step.batch, step.levels, result)
        return self._collect(step.batch, step.levels, result, step.setting_version)

    def _record_step(self, batch: ScheduledBatch, levels: Levels, result: StepResult) -> None:
        self._num_steps += 1
        self._num_tokens += batch.num_tokens
        self.recorder.record_step(
            StepRecord(
                prefill_tokens=batch.num_prefill_tokens,
                decode_tokens=batch.num_decode_tokens,
                levels=levels,
                step_time_s=result.step_time_s,
                predicted_s=self.brownout.predict_step_s(batch, levels),
                routed_pairs=batch.num_tokens * self._pairs_per_token,
                dimmed_pairs=sum(result.dimmed_pairs),
                spent=spent_by_class(batch, levels, self.info.level_loss),
            )
        )
        self.brownout.learn_step(batch, levels, result.step_time_s, self._clock())
        self._record_experts()

    def _record_experts(self) -> None:
        counter = self._runner.slot.counter if self._runner is not None else None
        now_s = self._clock()
        if counter is not None and now_s - self._experts_taken_s >= EXPERT_LOAD_PERIOD_S:
            self._experts_taken_s = now_s
            if (experts := counter.take()) is not None:
                self.recorder.record_experts(experts)

    def _collect(
        self, batch: ScheduledBatch, levels: Levels, result: StepResult, setting_version: int
    ) -> list[RequestOutput]:
        now_s = self._clock()
        requests, max_model_len, is_dimmed = self._requests, self.info.max_model_len, levels.peak > 0
        outputs = []
        for item, token_id, logprob, dimmed_pairs in zip(
            batch, result.token_ids, result.logprobs, result.dimmed_pairs, strict=True
        ):
            sequence = item.sequence
            state = requests.get(sequence.request_id)
            if state is None or state.sequence is not sequence:
                continue  # it ended while this step was under way
            sequence.charge(item.num_tokens, item.num_tokens * self._pairs_per_token, setting_version)
            if is_dimmed and not sequence.exact:
                sequence.charge_dimmed(item.num_tokens, dimmed_pairs, levels.of(item.phase))
            if token_id is None:
                continue
            if sequence.first_token_s is None:
                self._record_first_token(state, now_s)
            output = state.append(token_id, logprob, now_s, max_model_len)
            if output.finish_reason is not None:
                output = self._finish(state, output.finish_reason, output)
            outputs.append(output)
        return outputs

    def _record_first_token(self, state: RequestState, now_s: float) -> None:
        sequence = state.sequence
        admitted_s = sequence.admitted_s if sequence.admitted_s is not None else now_s
        self.recorder.record_first_token(
            sequence.request.service_class, now_s - sequence.arrival_s, admitted_s - sequence.arrival_s
        )

    def _finish(self, state: RequestState, reason: FinishReason, output: RequestOutput | None = None) -> RequestOutput:
        sequence = state.sequence
        del self._requests[sequence.request_id]
        self._num_needing_host -= state.needs_host
        self.scheduler.remove(sequence)
        if reason is not FinishReason.ABORT:
            self.brownout.learn_finish(sequence.num_generated)
            failed = reason is FinishReason.ERROR
            self.recorder.record_finish(sequence.request.service_class, state.mean_tpot_s, failed)
        self.request_log.append(state.record(reason, self._clock(), time.time()))
        return state.final_output(reason, output)

    def stats(self) -> EngineStats:
        """The load right now."""
        return stats_of(
            self.scheduler, self.brownout, self._clock(), self._num_preemptions, self._num_steps, self._num_tokens
        )
