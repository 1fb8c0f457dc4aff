from __future__ import annotations

import pytest
import torch

from engine.sampling.logprobs import LogitRows, PromptLogprobs, take_prompt_rows, token_logprobs

VOCAB = 20


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(1))


def test_each_row_reports_as_many_as_it_asked_for() -> None:
    logits = random_logits(3)
    found = token_logprobs(logits, torch.tensor([4, 5, 6]), [0, 2, 50])
    reference = logits.log_softmax(-1)
    assert [token.token_id for token in found] == [4, 5, 6]
    assert [len(token.top) for token in found] == [0, 2, VOCAB]
    for row, token in enumerate(found):
        assert token.logprob == pytest.approx(reference[row, token.token_id].item(), abs=1e-6)
    assert [token_id for token_id, _ in found[1].top] == reference[1].topk(2).indices.tolist()


def test_chunks_make_up_a_prompt_and_a_chunk_computed_again_changes_nothing() -> None:
    prompt, logits = (3, 1, 4, 1, 5), random_logits(6)
    at_once, by_chunk = PromptLogprobs(prompt, 1), PromptLogprobs(prompt, 1)
    at_once.take(logits[:5], 0)
    for start, end in ((0, 2), (0, 3), (3, 6)):  # the last one goes beyond the prompt
        by_chunk.take(logits[start:end], start)
    assert by_chunk.result() == at_once.result()
    first, *others = at_once.result()
    assert first is None
    reference = logits.log_softmax(-1)
    for position, token in enumerate(others, 1):
        assert token is not None and token.token_id == prompt[position]
        assert token.logprob == pytest.approx(reference[position - 1, token.token_id].item(), abs=1e-6)


def test_rows_go_to_their_collectors_and_the_sampling_ones_stay() -> None:
    logits, whole, part = random_logits(8), PromptLogprobs((1, 2, 3), 0), PromptLogprobs((5, 6, 7, 8), 0)
    rows = [
        LogitRows(1, 9, True),
        LogitRows(0, 3, False),
        LogitRows(3, 0, True, whole),
        LogitRows(3, 0, False, part),
        LogitRows(1, 4, True),
    ]
    assert torch.equal(take_prompt_rows(logits, rows), logits[[0, 3, 7]])
    assert [token.token_id for token in whole.result()[1:] if token] == [2, 3]
    part.take(random_logits(1), 3)
    assert len(part.result()) == 4
    assert take_prompt_rows(logits, [LogitRows(1, 0, True)] * 8) is logits
