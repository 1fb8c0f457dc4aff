"""The engine alone, synchronously: ends of requests, exhaustion, residency, overlapping steps."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from engine.config import CacheConfig, SchedulerConfig
from engine.types import (
    EngineBusyError,
    FinishReason,
    GenerationRequest,
    InvalidRequestError,
    RequestOutput,
)
from tests.unit.engine.stepping import PROMPT, make_engine, request, run, tokens


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
    answers, likelihoods = [], []
    for overlap_steps in (False, True):
        engine = make_engine(model, overlap_steps=overlap_steps)
        stop = tokens(run(engine, request("probe"))["probe"])[3]
        requests = [request(f"r{i}", PROMPT[i:], max_tokens=4 + i) for i in range(9)]
        requests.append(request("stopped", stop_token_ids=(stop,)))
        requests += [request(f"sampled {options}", seed=7, **options) for options in SAMPLED]
        outputs = run(engine, *requests)
        assert engine.scheduler.blocks.num_used == 0
        answers.append({name: (tokens(out), out[-1].finish_reason, out[-1].usage) for name, out in outputs.items()})
        likelihoods.append({name: logprobs(out) for name, out in outputs.items()})
    assert answers[0] == answers[1]
    for name, found in likelihoods[0].items():
        assert found == pytest.approx(likelihoods[1][name], abs=1e-4)  # a batch's size changes the last digits


def logprobs(outputs: list[RequestOutput]) -> list[float]:
    """How likely each token was, where that was asked for."""
    found = [entry for output in outputs for entry in output.logprobs or ()]
    assert not found or [entry.token_id for entry in found] == tokens(outputs)
    return [entry.logprob for entry in found]


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
