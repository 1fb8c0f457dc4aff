"""Workloads: reproducible, of the asked lengths, and without shared prefixes between marked runs."""

from itertools import islice

import pytest

from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import endless, synthesize

PROMPTS, OUTPUTS = LengthRange(16, 32), LengthRange(24, 48)
TIMES_S = [0.1 * i for i in range(500)]


def make(seed: int = 0):
    return synthesize(TIMES_S, 50.0, PROMPTS, OUTPUTS, vocab_size=1000, seed=seed)


def test_equal_seeds_give_equal_workloads_and_others_do_not():
    assert make() == make()
    assert make().arrivals != make(seed=1).arrivals


def test_lengths_fill_their_ranges_and_tokens_are_in_the_vocabulary():
    arrivals = make().arrivals
    assert {len(a.prompt_ids) for a in arrivals} == set(range(16, 33))
    assert {a.max_tokens for a in arrivals} == set(range(24, 49))
    assert all(0 <= token < 1000 for a in arrivals for token in a.prompt_ids)
    assert [a.at_s for a in arrivals] == TIMES_S


def test_a_mark_replaces_the_first_token_and_nothing_else():
    plain, marked = make(), make().marked(7)
    for before, after in zip(plain.arrivals, marked.arrivals, strict=True):
        assert after.prompt_ids == (7, *before.prompt_ids[1:])
        assert (after.at_s, after.max_tokens, after.seed) == (before.at_s, before.max_tokens, before.seed)


def test_endless_requests_are_reproducible():
    first, second = (list(islice(endless(PROMPTS, OUTPUTS, 1000, seed=9), 20)) for _ in range(2))
    assert first == second
    assert len({a.prompt_ids for a in first}) == 20


def test_an_empty_range_is_refused():
    with pytest.raises(ValueError, match="1 <= low <= high"):
        LengthRange(5, 4)
