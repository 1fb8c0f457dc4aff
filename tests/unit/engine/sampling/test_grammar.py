"""Grammars: masks that agree with the matcher, answers that follow their schema even from random logits."""

from __future__ import annotations

import json

import pytest
import torch
from llguidance import LLMatcher

from engine.request_state import RequestState
from engine.sampling.choose import sample
from engine.sampling.grammar import GrammarCompiler, GrammarState, allowed_words
from engine.sampling.logits import edit_
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.types import FinishReason, GenerationRequest, InvalidRequestError, SamplingParams
from tests.models import DEMO_MODEL

VOCAB = 4100  # more than the tokenizer has, as in models with a padded vocabulary
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMAR = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB)


def allowed_ids(state: GrammarState) -> set[int]:
    words = allowed_words([state], VOCAB)[0].view("uint32")
    return {i for i in range(VOCAB) if words[i // 32] >> (i % 32) & 1}


def test_the_mask_is_what_the_grammar_allows(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    state = compiler.compile(LLMatcher.grammar_from_regex("(ab|cd)+"))
    texts = {tokenizer.token_text(token_id) for token_id in allowed_ids(state)}
    assert {"a", "c"} <= texts
    assert all(text and ("abab".startswith(text) or "cdcd".startswith(text) or text[0] in "ac") for text in texts)
    logits = torch.zeros(1, VOCAB)
    request = RequestState(GenerationRequest("a", (1,), SamplingParams(grammar="x")), tokenizer, 0.0, VOCAB, state)
    edit_(logits, [request.sampling.edits(0)])
    assert set(torch.isfinite(logits[0]).nonzero()[:, 0].tolist()) == allowed_ids(state)


def test_states_of_one_grammar_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first, second = compiler.compile(GRAMMAR), compiler.compile(GRAMMAR)
    before = allowed_ids(second)
    first.append(min(before))
    assert allowed_ids(second) == before != allowed_ids(first)


@pytest.mark.parametrize("grammar", [LLMatcher.grammar_from_json_schema('{"type": "foo"}'), "no grammar"])
def test_a_grammar_that_is_none(compiler: GrammarCompiler, grammar: str) -> None:
    with pytest.raises(InvalidRequestError):
        compiler.compile(grammar)


def test_a_token_against_the_grammar_is_an_error(compiler: GrammarCompiler) -> None:
    state = compiler.compile(GRAMMAR)
    state.append(next(iter(set(range(VOCAB)) - allowed_ids(state))))
    assert state.error


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_random_logits_give_valid_json(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int, temperature: float
) -> None:
    """min_tokens and ignore_eos do not keep an answer going that is complete."""
    params = SamplingParams(
        max_tokens=400, temperature=temperature, seed=seed, grammar=GRAMMAR, min_tokens=300, ignore_eos=True
    )
    state = RequestState(GenerationRequest("a", (1,), params), tokenizer, 0.0, VOCAB, compiler.compile(GRAMMAR))
    generator, text = torch.Generator().manual_seed(seed), ""
    while True:
        token_id = sample(torch.randn(1, VOCAB, generator=generator), [state.sampling]).token_ids[0]
        output = state.append(token_id, None, 1.0, 1000)
        text += output.text
        if output.finish_reason is not None:
            break
    answer = json.loads(text + state.final_output(output.finish_reason, None).text)
    assert output.finish_reason is FinishReason.STOP
    assert list(answer) == ["name", "age", "tags"]
    assert answer["name"] in ("Ada", "Grace") and 0 <= answer["age"] <= 150
    assert len(answer["tags"]) <= 2 and all(len(tag) <= 4 for tag in answer["tags"])
