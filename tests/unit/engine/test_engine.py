"""The engine alone, synchronously: ends of requests, consent, exhaustion, residency."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import (
    BrownoutSetting,
    EngineBusyError,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    RequestOutput,
    SamplingParams,
    ServiceClass,
)
from tests.models import write_config

UNITED = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)
TOP_LEVEL = 4
PROMPT = tuple(range(100, 140))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("models") / "tiny"))


def make_engine(model: str, clock: Clock | None = None, **parts: object) -> Engine:
    parts.setdefault("scheduler", SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64))
    config = EngineConfig(ModelConfig(model, load_format="random"), **parts)  # type: ignore[arg-type]
    return Engine(config, clock or Clock())


def request(request_id: str = "a", prompt: tuple[int, ...] = PROMPT, **options: object) -> GenerationRequest:
    service_class = options.pop("service_class", ServiceClass.STANDARD)
    params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | options
    return GenerationRequest(request_id, prompt, SamplingParams(**params), service_class)  # type: ignore[arg-type]


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_length_ends_a_request_and_usage_adds_up(model: str) -> None:
    outputs = run(make_engine(model), request(max_tokens=5))["a"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    usage = outputs[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (len(PROMPT), 5, 0)
    # 3 layers x 4 experts for each computed token; the last generated one is never computed.
    assert usage.brownout.routed_pairs == (len(PROMPT) + 4) * 12
    assert usage.brownout.dimmed_pairs == 0


def test_stop_token_ends_a_request(model: str) -> None:
    engine = make_engine(model)
    first = tokens(run(engine, request())["a"])
    stopped = run(engine, request("b", stop_token_ids=(first[3],)))["b"]
    assert tokens(stopped) == first[: first.index(first[3]) + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert stopped[-1].stop_reason == first[3]


def test_stop_string_ends_a_request_and_is_not_shown(model: str) -> None:
    engine = make_engine(model)
    text = "".join(o.text for o in run(engine, request())["a"])
    stop = text[4:7]
    outputs = run(engine, request("b", stop=(stop,)))["b"]
    assert "".join(o.text for o in outputs) == text[: text.index(stop)]
    assert outputs[-1].stop_reason == stop


def test_min_tokens_defers_stopping(model: str) -> None:
    engine = make_engine(model)
    first = tokens(run(engine, request())["a"])
    outputs = run(engine, request("b", stop_token_ids=tuple(set(first)), min_tokens=6))["b"]
    assert len(tokens(outputs)) >= 6


def test_the_context_length_ends_a_request(model: str) -> None:
    engine = make_engine(model, cache=CacheConfig(block_size=16, num_blocks=5))
    assert engine.info.max_model_len == 64
    outputs = run(engine, request(max_tokens=64 - len(PROMPT)))["a"]
    assert len(tokens(outputs)) == 64 - len(PROMPT)


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        (request(prompt=()), "prompt"),
        (request(prompt=(5000,)), "prompt"),
        (request(prompt=tuple(range(600)), max_tokens=1), "prompt"),
        (request(max_tokens=500), "max_tokens"),
        (request(logit_bias=((4096, 1.0),)), "logit_bias"),
    ],
)
def test_impossible_requests_are_refused_and_leave_nothing(model: str, bad: GenerationRequest, param: str) -> None:
    engine = make_engine(model)
    with pytest.raises(InvalidRequestError) as error:
        engine.add(bad)
    assert error.value.param == param
    assert not engine.has_work


def test_a_full_queue_is_busy(model: str) -> None:
    scheduler = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_num_waiting=2)
    engine = make_engine(model, scheduler=scheduler)
    engine.add(request("a"))
    engine.add(request("b"))
    with pytest.raises(EngineBusyError):
        engine.add(request("c"))


def test_abort_frees_blocks_at_once(model: str) -> None:
    engine = make_engine(model)
    for request_id in "ab":
        engine.add(request(request_id, prompt=tuple(ord(request_id) + t for t in PROMPT)))
    engine.step()
    used = engine.scheduler.blocks.num_used
    output = engine.abort("a")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert engine.scheduler.blocks.num_used == used // 2
    assert engine.abort("a") is None
    assert len(tokens([o for _ in range(9) for o in engine.step()])) >= 6


def test_running_out_of_blocks_preempts_and_everyone_finishes(model: str) -> None:
    plenty = make_engine(model)
    scarce = make_engine(model, cache=CacheConfig(block_size=4, num_blocks=30))
    requests = [request(str(i), prompt=tuple(range(i, i + 20)), max_tokens=40) for i in range(6)]
    expected = run(plenty, *requests)
    outputs = run(scarce, *requests)
    assert scarce.stats().num_preemptions > 0
    assert {k: tokens(v) for k, v in outputs.items()} == {k: tokens(v) for k, v in expected.items()}
    assert scarce.scheduler.blocks.num_used == 0


def test_a_pinned_level_dims_all_but_full_class_requests(model: str) -> None:
    exact = tokens(run(make_engine(model, brownout=UNITED), request("exact"))["exact"])
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    others = [request(f"other{i}", prompt=tuple(range(i * 50, i * 50 + 40))) for i in range(3)]
    outputs = run(engine, request("full", service_class=ServiceClass.FULL), *others)
    assert tokens(outputs["full"]) == exact
    usages = {request_id: parts[-1].usage for request_id, parts in outputs.items()}
    full, other = usages["full"], usages["other0"]
    assert full is not None
    assert other is not None
    assert (full.brownout.dimmed_pairs, full.brownout.level_peak) == (0, 0)
    assert other.brownout.dimmed_pairs > 0
    assert (other.brownout.level_peak, other.brownout.level_mean) == (TOP_LEVEL, TOP_LEVEL)
    total = sum(u.brownout.dimmed_pairs for u in usages.values() if u is not None)
    assert engine.recorder.totals().dimmed_pairs == total


def test_what_was_lost_is_booked_by_class_and_told_in_the_log(model: str, tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.json"
    levels = [{"way": 1, "share": 0.0, "loss": 0.0}, {"way": 2, "share": 1.0, "loss": 0.25}]
    ladder.write_text(json.dumps({"levels": levels}))
    engine = make_engine(model, brownout=replace(UNITED, ladder=str(ladder), allow_unmeasured=False))
    engine.apply_setting(replace(BrownoutSetting.pinned(1), epoch=1, version=7))
    run(engine, request("dimmed"), request("full", service_class=ServiceClass.FULL))
    window = engine.recorder.drain(engine.stats(), 1.0)
    standard, full = window.classes[ServiceClass.STANDARD], window.classes[ServiceClass.FULL]
    assert standard.num_tokens == full.num_tokens == len(PROMPT) + 7
    assert standard.loss_nats == pytest.approx(0.25 * standard.num_tokens)
    assert full.loss_nats == 0.0
    (record,) = engine.request_log.find("dimmed")
    assert (record.level_mean, record.level_peak, record.completion_tokens) == (1.0, 1, 8)
    assert (record.first_setting_version, record.last_setting_version) == (7, 7)
    assert (record.finish_reason, record.service_class) == ("length", "standard")


def test_every_pair_is_counted_on_its_expert(model: str) -> None:
    engine = make_engine(model)
    run(engine, request())
    slot = engine.leave()
    assert slot.counter is not None
    slot.counter.take()
    experts = slot.counter.take()
    assert experts is not None and experts.layer == (0, 1, 2)
    pairs_per_layer = engine.stats().num_tokens * slot.spec.num_experts_per_token
    assert slot.counter._total[:, :-1].sum(dim=1).tolist() == [pairs_per_layer] * 3
    assert all(4 <= num_active <= 12 for num_active in experts.active_experts)


def test_a_dimmed_prefix_is_never_reused_by_a_full_class_request(model: str) -> None:
    exact = tokens(run(make_engine(model, brownout=UNITED), request("exact"))["exact"])
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    run(engine, request("dimmed"))
    outputs = run(engine, request("again"), request("full", service_class=ServiceClass.FULL))
    again, full = outputs["again"][-1].usage, outputs["full"][-1].usage
    assert again is not None
    assert full is not None
    assert again.cached_tokens == 32
    assert full.cached_tokens == 0
    assert tokens(outputs["full"]) == exact


def test_usage_tells_what_reused_kv_was_computed_at(model: str) -> None:
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    run(engine, request("dimmed"))
    engine.apply_setting(BrownoutSetting.pinned(0))
    usage = run(engine, request("again"))["again"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 32
    assert (usage.brownout.dimmed_pairs, usage.brownout.level_mean) == (0, 0)
    assert usage.brownout.level_peak == TOP_LEVEL


def test_usages_add_up_to_the_engines_counters(model: str) -> None:
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(1))
    classes = (ServiceClass.STANDARD, ServiceClass.FULL, ServiceClass.STANDARD)
    outputs = run(engine, *(request(f"r{i}", service_class=c) for i, c in enumerate(classes)))
    usages = [stream[-1].usage for stream in outputs.values()]
    totals = engine.recorder.totals()
    assert sum(u.brownout.dimmed_pairs for u in usages if u is not None) == totals.dimmed_pairs > 0
    assert sum(u.brownout.routed_pairs for u in usages if u is not None) == totals.routed_pairs
    assert engine.recorder.drain(engine.stats(), 1.0).dimmed_pairs == totals.dimmed_pairs


def test_an_unmeasured_ladder_is_not_climbed_unless_allowed_by_name(model: str) -> None:
    unmeasured = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, profile_repeats=0)
    engine = make_engine(model, brownout=unmeasured)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    usage = run(engine, request())["a"][-1].usage
    assert usage is not None
    assert usage.brownout.dimmed_pairs == 0


def test_settings_are_ordered_and_leased(model: str) -> None:
    clock = Clock()
    engine = make_engine(model, clock, brownout=UNITED)
    pinned = BrownoutSetting.pinned(TOP_LEVEL)
    newer = BrownoutSetting(pinned.prefill, pinned.decode, epoch=2, version=7, lease_s=2.0)
    older = BrownoutSetting(pinned.prefill, pinned.decode, epoch=1, version=9)
    assert engine.apply_setting(newer)
    assert not engine.apply_setting(older)
    usage = run(engine, request())["a"][-1].usage
    assert usage is not None
    assert (usage.brownout.level_peak, usage.brownout.setting_version) == (TOP_LEVEL, 7)
    clock.now_s += 2.5
    assert engine.stats().lease_expired
    usage = run(engine, request("b"))["b"][-1].usage
    assert usage is not None
    assert usage.brownout.dimmed_pairs == 0  # the SLO needs no dimming here, so the safe policy does none
    assert engine.apply_setting(newer)  # a renewal
    assert not engine.stats().lease_expired


def test_the_model_can_be_left_and_taken_up_between_steps(model: str) -> None:
    expected = tokens(run(make_engine(model), request())["a"])
    engine = make_engine(model)
    engine.add(request())
    outputs = engine.step() + engine.step()
    slot = engine.leave()
    assert not engine.has_work
    assert engine.step() == []
    engine.take_up(slot)
    while engine.has_work:
        outputs += engine.step()
    assert tokens(outputs) == expected


def test_nothing_else_holds_on_to_a_slot(model: str) -> None:
    engine = make_engine(model)
    run(engine, request())
    slot = engine.leave()
    parts = [weakref.ref(slot), weakref.ref(slot.model), weakref.ref(slot.kv), weakref.ref(slot.kv.keys)]
    del slot
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)


def test_seeded_sampling_does_not_depend_on_neighbours(model: str) -> None:
    engine = make_engine(model)
    alone = tokens(run(engine, request(temperature=1.0, seed=5))["a"])
    neighbours = [request(str(i), prompt=tuple(range(i, i + 30)), temperature=1.0) for i in range(5)]
    assert tokens(run(engine, request(temperature=1.0, seed=5), *neighbours)["a"]) == alone
    assert tokens(run(engine, request(temperature=1.0, seed=6))["a"]) != alone


def test_logprobs_come_with_their_tokens(model: str) -> None:
    outputs = run(make_engine(model), request(logprobs=3))["a"]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    assert [entry.token_id for entry in logprobs] == tokens(outputs)
    for entry in logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))  # greedy takes the likeliest


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 20, "min_p": 0.01},
    {"temperature": 0, "logprobs": 2, "min_tokens": 3},
    {"temperature": 1.5, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.2},
]


def test_overlapping_steps_change_nothing_but_when_outputs_come(model: str) -> None:
    """Greedy and sampled requests, stop tokens and stop strings, more requests than places."""
    answers = []
    for overlap_steps in (False, True):
        engine = make_engine(model, overlap_steps=overlap_steps)
        stop = tokens(run(engine, request("probe"))["probe"])[3]
        requests = [request(f"r{i}", PROMPT[i:], max_tokens=4 + i) for i in range(9)]
        requests.append(request("stopped", stop_token_ids=(stop,)))
        requests += [request(f"sampled {options}", seed=7, **options) for options in SAMPLED]
        outputs = run(engine, *requests)
        assert engine.scheduler.blocks.num_used == 0
        answers.append(
            {name: (tokens(out), logprobs(out), out[-1].finish_reason, out[-1].usage) for name, out in outputs.items()}
        )
    assert answers[0] == answers[1]


def logprobs(outputs: list[RequestOutput]) -> list[tuple[int, float]]:
    """Which tokens said how likely they were; a batch's size changes the last digits."""
    return [(found.token_id, round(found.logprob, 2)) for output in outputs for found in output.logprobs or ()]


@pytest.mark.parametrize("options", [{}, *SAMPLED], ids=str)
def test_overlapping_steps_are_one_ahead_of_their_outputs(model: str, options: dict[str, Any]) -> None:
    engine = make_engine(model, overlap_steps=True)
    engine.add(request(**options | {"max_tokens": 2, "min_tokens": 0}))
    assert [len(engine.step()) for _ in range(3)] == [0, 1, 1]
    assert not engine.has_work


def test_ending_a_request_whose_step_is_under_way(model: str) -> None:
    engine = make_engine(model, overlap_steps=True)
    expected = tokens(run(engine, request("alone"))["alone"])
    engine.add(request("a"))
    engine.step()
    assert engine.abort("a") is not None
    assert engine.scheduler.blocks.num_used == 0
    assert tokens(run(engine, request("a"))["a"]) == expected  # the same name again, while the old step ends


def test_leaving_a_model_loses_no_output_of_the_step_under_way(model: str) -> None:
    engine = make_engine(model, overlap_steps=True)
    expected = tokens(run(engine, request("alone"))["alone"])
    engine.add(request("a"))
    engine.step()
    slot = engine.leave()
    held = engine.step()
    assert (tokens(held), engine.has_work) == (expected[:1], False)
    engine.take_up(slot)
    rest = []
    while engine.has_work:
        rest += engine.step()
    assert tokens([*held, *rest]) == expected
