"""Every family in bfloat16 on kernels and graphs is as near to the exact model as transformers in bfloat16 is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import SchedulerConfig
from engine.types import GenerationRequest, SamplingParams
from tests.gpu.engines import UNDIMMED, make_engine, record_logits
from tests.models import FAMILIES, write_checkpoint

pytestmark = pytest.mark.gpu

PROMPT_LENGTHS = (1, 3, 17, 40, 90, 130)
NUM_TOKENS = 40
ERROR_FACTOR = 1.5  # of transformers' own error: other roundings, no further ones


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_the_exact_model_as_transformers(gpu: torch.device, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = write_checkpoint(tmp_path / "tiny", **FAMILIES[family])
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(gpu)
    exact = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(gpu).float()
    ours, theirs = [], []
    agree_ours, agree_theirs = [], []
    for prompt, answer, logits in generate(checkpoint):
        token_ids = torch.tensor([[*prompt, *answer]], device=gpu)
        with torch.inference_mode():  # not around the engine, whose threads load weights outside it
            expected, other = (model(token_ids).logits[0, len(prompt) - 1 : -1].float() for model in (exact, rounded))
        ours.append(relative_error(logits, expected))
        theirs.append(relative_error(other, expected))
        agree_ours.append(torch.tensor(answer, device=gpu) == expected.argmax(-1))
        agree_theirs.append(other.argmax(-1) == expected.argmax(-1))
    error, allowed = torch.cat(ours).median(), ERROR_FACTOR * torch.cat(theirs).median()
    assert 0 < error < allowed, f"median relative error {error:.4f}, transformers' times {ERROR_FACTOR}: {allowed:.4f}"
    agreement, other_agreement = (torch.cat(agree).float().mean() for agree in (agree_ours, agree_theirs))
    assert agreement > other_agreement - 0.05
    assert agreement > 0.8


def relative_error(logits: Tensor, expected: Tensor) -> Tensor:
    """Of each row. The median over rows does not mind the few whose experts are chosen otherwise."""
    return (logits - expected).norm(dim=-1) / expected.norm(dim=-1)


def generate(checkpoint: Path) -> list[tuple[tuple[int, ...], list[int], Tensor]]:
    """Prompts, their greedy answers and the logits [NUM_TOKENS, V] that these were chosen from."""
    engine = make_engine(
        checkpoint,
        UNDIMMED,
        "bfloat16",
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
        overlap_steps=False,
    )
    steps = record_logits(engine)
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(4096) for _ in range(length)) for length in PROMPT_LENGTHS]
    answers: list[list[int]] = [[] for _ in prompts]
    rows: list[list[Tensor]] = [[] for _ in prompts]
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        engine.add(GenerationRequest(str(index), prompt, sampling))
    while engine.has_work:
        for row, output in enumerate(engine.step()):
            answers[int(output.request_id)] += output.token_ids
            rows[int(output.request_id)].append(steps[-1][row])
    return [(prompt, answers[i], torch.stack(rows[i]).float()) for i, prompt in enumerate(prompts)]
