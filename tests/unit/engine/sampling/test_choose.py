"""Each sampling option against a plain one-row reference or a closed form, and the draw against its distribution."""

import math
import random
from collections import Counter

import pytest
import torch

from engine.sampling.choose import choose, sample
from engine.sampling.draw import _truncate
from engine.sampling.logits import edit_
from engine.sampling.state import SamplingState
from engine.types import InvalidRequestError, SamplingParams

VOCAB = 50
DRAWN_AT_ONCE = 100


def make_state(prompt_ids=(), stop_ids=(), vocab_size=VOCAB, fallback_seed=0, **params) -> SamplingState:
    return SamplingState(SamplingParams(**params), tuple(prompt_ids), vocab_size, frozenset(stop_ids), fallback_seed)


def random_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draw(row: list[float], num_draws: int, seed: int = 5, **params) -> Counter:
    """By a batch of requests, step after step; ``num_draws`` is a multiple of DRAWN_AT_ONCE."""
    states = [make_state(vocab_size=len(row), seed=seed + number, **params) for number in range(DRAWN_AT_ONCE)]
    logits = torch.tensor([row]).repeat(DRAWN_AT_ONCE, 1)
    steps = [sample(logits, states).token_ids for _ in range(num_draws // DRAWN_AT_ONCE)]
    return Counter(token_id for step in steps for token_id in step)


def softmax(row: list[float]) -> list[float]:
    largest = max(row)
    exps = [math.exp(x - largest) for x in row]
    total = sum(exps)
    return [x / total for x in exps]


def reference_adjusted(row: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """logit_bias and penalties, as their documentation words them, one token at a time."""
    bias = dict(params.logit_bias)
    adjusted = []
    for token_id, logit in enumerate(row):
        value = logit + bias.get(token_id, 0.0)
        if token_id in prompt or token_id in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token_id)
        value -= params.presence_penalty * (token_id in output)
        adjusted.append(value)
    return adjusted


def reference_support(row: list[float], params: SamplingParams) -> dict[int, float]:
    """token |-> probability after temperature, min_p, top_k and top_p, by the definition of each."""
    probs = dict(enumerate(softmax([x / params.temperature for x in row])))
    least = params.min_p * max(probs.values())
    probs = {t: p for t, p in probs.items() if p >= least}
    ranked = sorted(probs, key=lambda t: -probs[t])
    if params.top_k != -1:
        ranked = ranked[: params.top_k]
    total = sum(probs[t] for t in ranked)
    kept, mass = [], 0.0
    for token_id in ranked:
        if mass >= params.top_p:
            break
        kept.append(token_id)
        mass += probs[token_id] / total
    kept_mass = sum(probs[t] for t in kept)
    return {t: probs[t] / kept_mass for t in kept}


def test_greedy_rows_take_the_argmax():
    logits = random_logits(4)
    result = sample(logits, [make_state(temperature=0) for _ in range(4)])
    assert result.token_ids == logits.argmax(-1).tolist()
    assert result.logprobs == [None] * 4


@pytest.mark.parametrize("seed", range(20))
def test_bias_and_penalties_match_the_reference(seed):
    rng = random.Random(seed)
    params = {
        "repetition_penalty": rng.choice([1.0, 0.7, 1.8]),
        "presence_penalty": rng.choice([0.0, -1.5, 1.5]),
        "frequency_penalty": rng.choice([0.0, -0.5, 0.8]),
        "logit_bias": tuple((t, rng.uniform(-9, 9)) for t in rng.sample(range(VOCAB), rng.choice([0, 4]))),
    }
    prompt, output = rng.choices(range(VOCAB), k=12), rng.choices(range(VOCAB), k=20)
    state = make_state(prompt, temperature=0, **params)
    for token_id in output:
        state.append(token_id)
    logits = random_logits(1, seed)
    expected = reference_adjusted(logits[0].tolist(), state.params, prompt, output)
    adjusted = logits.clone()
    edit_(adjusted, [state.edits(0)])
    torch.testing.assert_close(adjusted[0], torch.tensor(expected))
    assert sample(logits, [state]).token_ids == [max(range(VOCAB), key=lambda t: expected[t])]


def test_the_callers_logits_are_left_alone():
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, [make_state(logit_bias=((3, 50.0),)), make_state(top_p=0.5, min_p=0.1), make_state(temperature=0)])
    assert torch.equal(logits, before)


def test_stop_ids_are_masked_until_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 10
    logits[0, 8] = 9
    logits[0, 9] = 8
    state = make_state(stop_ids=(7, 8, VOCAB + 5), temperature=0, min_tokens=2)
    tokens = []
    for _ in range(3):
        tokens += sample(logits, [state]).token_ids
        state.append(tokens[-1])
    assert tokens == [9, 9, 7]


def test_logit_bias_can_force_a_token():
    assert sample(random_logits(1), [make_state(logit_bias=((11, 100.0),), seed=1)]).token_ids == [11]


def test_logit_bias_beyond_the_vocabulary():
    with pytest.raises(InvalidRequestError) as caught:
        make_state(logit_bias=((VOCAB, 1.0),))
    assert caught.value.param == "logit_bias"


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 3},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 2.0, "min_p": 0.2, "top_k": 4, "top_p": 0.7},
    ],
)
def test_only_tokens_of_the_reference_support_are_drawn_each_with_its_share(params):
    row = [2.0, 1.5, 1.0, 0.0, -0.5, 0.7, -1.0, 1.9]
    num_draws = 3000
    counts = draw(row, num_draws, **params)
    expected = reference_support(row, SamplingParams(**params))
    assert set(counts) == set(expected)
    chi_square = sum((counts[t] - num_draws * p) ** 2 / (num_draws * p) for t, p in expected.items())
    assert chi_square < 30  # p < 0.001 at 8 degrees of freedom is 26.1; the seed is fixed


def test_the_plain_draw_has_the_softmax_distribution():
    row = random_logits(1, vocab_size=20)[0].tolist()
    num_draws = 20_000
    counts = draw(row, num_draws)
    for token_id, prob in enumerate(softmax(row)):
        deviation = math.sqrt(num_draws * prob * (1 - prob))
        assert abs(counts[token_id] - num_draws * prob) < 4 * deviation + 1


def test_equal_logits_at_the_top_k_edge_keep_exactly_k():
    assert set(draw([1.0] * 6, 500, top_k=2)) == {0, 1}


def test_rounding_drops_no_token_of_a_row_without_top_p():
    ranked = torch.tensor([[1.0, 1e-13, 1e-17]])  # 1 + 1e-13 is 1 in float32
    top_k, top_p = torch.tensor([[2]]), torch.tensor([[1.0]])
    kept, complete = _truncate(ranked, ranked.sum(-1, keepdim=True), top_k, top_p, 3)
    assert torch.equal(kept, torch.tensor([[1.0, 1e-13, 0.0]]))
    assert complete.all()


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 300}, {"top_k": 6000, "top_p": 0.7}, {"min_p": 0.4}])
def test_a_large_vocabulary_is_truncated_as_if_all_of_it_were_ranked(spread, options):
    """Flat rows need more candidates than the prefilter ranks first, peaked ones do not."""
    vocab_size = 9000
    row = random_logits(1, seed=3, vocab_size=vocab_size) * spread
    expected = reference_support(row[0].tolist(), SamplingParams(**options))
    states = [make_state(vocab_size=vocab_size, seed=seed, **options) for seed in range(400)]
    drawn = sample(row.expand(400, -1), states).token_ids
    least = min(expected.values())
    outside = [t for t in drawn if t not in expected]
    assert all(abs(math.exp((row[0, t] - row[0].max()).item()) - least) < 1e-3 for t in outside)
    assert len(outside) <= 4  # at the edge float32 sums may differ from Python's
    likely = set(sorted(expected, key=expected.get)[-len(expected) // 2 :])
    share, count = sum(expected[t] for t in likely), sum(t in likely for t in drawn)
    assert abs(count - 400 * share) < 4 * math.sqrt(400 * share * (1 - share)) + 1


def test_each_row_of_a_mixed_batch_is_drawn_from_its_own_set():
    logits = random_logits(6, seed=4, vocab_size=5000)
    options = [{"temperature": 0}, {"top_k": 1}, {}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 2, "min_p": 1.0}]
    states = [make_state(vocab_size=5000, seed=i, **given) for i, given in enumerate(options)]
    chosen, best = sample(logits, states).token_ids, logits.argmax(-1).tolist()
    assert [chosen[i] for i in (0, 1, 3, 4, 5)] == [best[i] for i in (0, 1, 3, 4, 5)]


def test_a_tiny_temperature_is_greedy():
    logits = random_logits(8)
    states = [make_state(temperature=1e-30, seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(8)]
    assert sample(logits, states).token_ids == logits.argmax(-1).tolist()


def test_masked_tokens_are_never_drawn():
    row = [-math.inf] * 30 + [0.0, 1.0]
    assert set(draw(row, 500)) == {30, 31}
    assert set(draw(row, 500, top_p=0.999)) == {30, 31}


def generate(seeded: SamplingState, logits: torch.Tensor, neighbours: list[SamplingState], place: int) -> list[int]:
    states = [*neighbours[:place], seeded, *neighbours[place:]]
    tokens = []
    for step, row in enumerate(logits):
        batch = random_logits(len(states), seed=1000 + step)
        batch[place] = row
        chosen = sample(batch, states).token_ids
        tokens.append(chosen[place])
        for state, token_id in zip(states, chosen, strict=True):
            state.append(token_id)
    return tokens


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 9, "min_p": 0.01}, {"presence_penalty": 1.0}])
def test_a_seeded_row_does_not_depend_on_its_neighbours(params):
    logits = random_logits(30, seed=9)
    alone = generate(make_state(seed=42, fallback_seed=1, **params), logits, [], 0)
    for place in (0, 2, 4):
        neighbours = [
            make_state(temperature=0),
            make_state(top_k=5, fallback_seed=3),
            make_state(frequency_penalty=1.0, logprobs=4),
            make_state(top_p=0.3, min_p=0.1, logit_bias=((1, 5.0),)),
        ]
        assert generate(make_state(seed=42, fallback_seed=2, **params), logits, neighbours, place) == alone


def test_seeds_tell_rows_apart():
    logits = torch.zeros(1, VOCAB)
    runs = {
        tuple(sample(logits, [state]).token_ids[0] for _ in range(8))
        for state in (make_state(seed=1), make_state(seed=2), make_state(fallback_seed=3), make_state(seed=-1))
    }
    assert len(runs) == 4
    assert make_state(seed=2**64 + 5)  # any integer is a seed


def test_logprobs_are_the_raw_models():
    logits = random_logits(3)
    states = [
        make_state(temperature=0, logprobs=3, logit_bias=((5, 100.0),)),
        make_state(temperature=0),
        make_state(temperature=1.7, logprobs=0, top_k=4, seed=3),
    ]
    result = sample(logits, states)
    reference = logits.double().log_softmax(-1)
    first, second, third = result.logprobs
    assert second is None
    assert first.token_id == result.token_ids[0] == 5
    assert first.logprob == pytest.approx(reference[0, 5].item(), abs=1e-5)
    values, ids = reference[0].topk(3)
    assert [token_id for token_id, _ in first.top] == ids.tolist()
    assert [logprob for _, logprob in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert third.token_id == result.token_ids[2]
    assert third.logprob == pytest.approx(reference[2, third.token_id].item(), abs=1e-5)
    assert third.top == ()


def test_no_rows():
    assert sample(torch.zeros(0, VOCAB), []).token_ids == []


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_choice_made_before_the_last_token_is_told_is_the_same(temperature):
    """Penalties and min_tokens of a state that learns each token one choice late, from ``newest`` until then."""
    options = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 0.8},
        {"frequency_penalty": 0.3, "logit_bias": ((3, 4.0),), "min_tokens": 5},
        {"top_p": 0.8},
        {},
    ]
    told, late = (
        [make_state((1, 2, 2), (7,), seed=i, temperature=temperature, **given) for i, given in enumerate(options)]
        for _ in range(2)
    )
    chosen: list[list[int]] = []
    for step in range(12):
        logits = random_logits(len(options), seed=step % 3) / 2  # so that tokens come again
        expected = sample(logits, told).token_ids
        for state, token_id in zip(told, expected, strict=True):
            state.append(token_id)
        newest = torch.tensor(chosen[-1] if chosen else [0] * len(options))
        assert choose(logits, late, newest).token_ids.tolist() == expected
        for state, token_id in zip(late, chosen[-1] if chosen else (), strict=False):
            state.append(token_id)
        chosen.append(expected)
    assert any(len(set(tokens)) < len(tokens) for tokens in zip(*chosen, strict=True))
