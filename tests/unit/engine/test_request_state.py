from __future__ import annotations

from typing import Any

import pytest

from engine.request_state import RequestState
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.types import FinishReason, GenerationRequest, RequestOutput, SamplingParams, TokenLogprob
from tests.models import DEMO_MODEL

MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


def make_state(tokenizer: Tokenizer, num_prompt: int = 3, **options: Any) -> RequestState:
    sampling = SamplingParams(**({"max_tokens": 20} | options))
    request = GenerationRequest("a", tuple(range(num_prompt)), sampling)
    return RequestState(request, tokenizer, 0.0, 4096)


def feed(state: RequestState, token_ids: list[int], now_s: float = 1.0) -> list[RequestOutput]:
    """Appends until the request ends, a token each 0.1 s."""
    outputs: list[RequestOutput] = []
    for index, token_id in enumerate(token_ids):
        outputs.append(state.append(token_id, None, now_s + 0.1 * index, MAX_MODEL_LEN))
        if outputs[-1].finished:
            break
    return outputs


def ending(outputs: list[RequestOutput]) -> tuple[int, FinishReason | None, str | int | None]:
    return len(outputs), outputs[-1].finish_reason, outputs[-1].stop_reason


def test_text_arrives_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Grüße, 世界 🙂 and goodbye")
    state = make_state(tokenizer, max_tokens=len(ids))
    outputs = feed(state, ids)
    assert ending(outputs) == (len(ids), FinishReason.LENGTH, None)
    last = state.final_output(FinishReason.LENGTH, outputs[-1])
    assert "".join(output.text for output in [*outputs[:-1], last]) == tokenizer.decode(ids)
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, len(ids))


def test_eos_ends_a_request_without_text_unless_ignored(tokenizer: Tokenizer) -> None:
    eos = min(tokenizer.eos_token_ids)
    ids = [*tokenizer.encode("yes"), eos, *tokenizer.encode("no")]
    outputs = feed(make_state(tokenizer), ids)
    assert ending(outputs) == (ids.index(eos) + 1, FinishReason.STOP, None)
    assert outputs[-1].text == ""
    assert ending(feed(make_state(tokenizer, ignore_eos=True), ids))[0] == len(ids)


def test_a_stop_token_is_the_reason(tokenizer: Tokenizer) -> None:
    assert ending(feed(make_state(tokenizer, stop_token_ids=(77,)), [5, 77, 6])) == (2, FinishReason.STOP, 77)


def test_min_tokens_counts_the_ending_token(tokenizer: Tokenizer) -> None:
    state = make_state(tokenizer, stop_token_ids=(77,), min_tokens=3)
    assert ending(feed(state, [77, 77, 77, 77])) == (3, FinishReason.STOP, 77)


def test_the_last_allowed_token_may_also_stop(tokenizer: Tokenizer) -> None:
    assert ending(feed(make_state(tokenizer, max_tokens=2, stop_token_ids=(77,)), [5, 77])) == (
        2,
        FinishReason.STOP,
        77,
    )


def test_the_context_length_ends_a_request(tokenizer: Tokenizer) -> None:
    outputs = feed(make_state(tokenizer, num_prompt=MAX_MODEL_LEN - 2), [5, 6, 7])
    assert ending(outputs) == (2, FinishReason.LENGTH, None)


def test_what_a_stop_string_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two thr")
    state = make_state(tokenizer, stop=("three",))
    outputs = feed(state, ids)
    assert "".join(output.text for output in outputs) == "one two "
    assert state.final_output(FinishReason.ABORT, None).text == "thr"


def test_logprobs_go_with_their_token(tokenizer: Tokenizer) -> None:
    logprob = TokenLogprob(5, -0.25)
    assert make_state(tokenizer).append(5, logprob, 1.0, MAX_MODEL_LEN).logprobs == (logprob,)


def test_tpot_is_the_mean_after_the_first_token(tokenizer: Tokenizer) -> None:
    state = make_state(tokenizer)
    assert state.mean_tpot_s is None
    feed(state, [5])
    assert state.mean_tpot_s is None
    feed(state, [6, 7], now_s=1.5)
    assert state.sequence.first_token_s == 1.0
    assert state.mean_tpot_s == pytest.approx(0.3)
