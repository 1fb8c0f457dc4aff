"""Scoring as lm-evaluation-harness does it: its `local-completions` requests, its arithmetic on the answers, compared
with transformers. The package itself draws in data set libraries and is not a dependency of the tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cluster.ingress.config import IngressSection
from tests.integration.served_api import MODEL, ServedApi, engine_config, serve
from tests.models import write_checkpoint

Pair = tuple[list[int], list[int]]  # context, continuation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[ServedApi]:
    with serve(engine_config(checkpoint, "safetensors", context_tokens=512), IngressSection()) as served:
        yield served


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """As in multiple choice: several continuations of one context; some contexts span several prefill chunks."""
    rng = random.Random(1)
    found = []
    for length in (1, 20, 300):
        context = [rng.randrange(4096) for _ in range(length)]
        found += [(context, [rng.randrange(4096) for _ in range(n)]) for n in (1, 2, 7)]
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Path, pairs: list[Pair]) -> list[tuple[float, bool]]:
    from transformers import Qwen2MoeForCausalLM

    model = Qwen2MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scores = []
    for context, continuation in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])
        scores.append((chosen.sum().item(), logits.argmax(-1).tolist() == continuation))
    return scores


def payload(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """lm_eval/models/openai_completions.py, LocalCompletionsAPI._create_payload with generate=False."""
    return {
        "model": MODEL,
        "prompt": prompts,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
        "temperature": 0,
    }


def parse_logprobs(answer: dict[str, Any], context_lens: list[int], num_generated: int) -> list[tuple[float, bool]]:
    """Its parse_logprobs: the sum over the continuation, and whether each of its tokens was the likeliest."""
    scores = []
    for choice, length in zip(sorted(answer["choices"], key=lambda c: c["index"]), context_lens, strict=True):
        end = len(choice["logprobs"]["token_logprobs"]) - num_generated
        logprobs = choice["logprobs"]["token_logprobs"][length:end]
        tops = choice["logprobs"]["top_logprobs"][length:end]
        greedy = all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))
        scores.append((sum(logprobs), greedy))
    return scores


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_equal_transformers(
    served: ServedApi, pairs: list[Pair], expected: list[tuple[float, bool]], max_tokens: int
) -> None:
    prompts = [context + continuation for context, continuation in pairs]
    response = httpx.post(f"{served.url}/v1/completions", json=payload(prompts, max_tokens), timeout=60)
    assert response.status_code == 200, response.text
    scores = parse_logprobs(response.json(), [len(context) for context, _ in pairs], max_tokens)
    assert [logprob for logprob, _ in scores] == pytest.approx([logprob for logprob, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def test_the_likeliest_continuation_counts_as_greedy(served: ServedApi, pairs: list[Pair]) -> None:
    context = pairs[-1][0]
    body = {"model": MODEL, "prompt": [context], "max_tokens": 5, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    said = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    continuation = httpx.post(f"{served.url}/tokenize", json={"prompt": said["text"]}, timeout=60).json()["tokens"]
    if len(continuation) != 5:
        pytest.skip("the answer's text has another tokenization")
    response = httpx.post(f"{served.url}/v1/completions", json=payload([context + continuation], 1), timeout=60)
    ((logprob, greedy),) = parse_logprobs(response.json(), [len(context)], 1)
    assert greedy and logprob == pytest.approx(sum(said["logprobs"]["token_logprobs"]), abs=1e-3)
