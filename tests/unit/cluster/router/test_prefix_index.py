from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.router.prefix_index import BLOCK_TOKENS, MAX_BLOCKS, PrefixIndex

SYSTEM = tuple(range(3 * BLOCK_TOKENS))


def test_equal_beginnings_are_found_in_whole_blocks() -> None:
    index = PrefixIndex()
    index.insert((*SYSTEM, 7, 8), "a")
    assert index.match((*SYSTEM, 9)) == {"a": 3 * BLOCK_TOKENS}
    assert index.match(SYSTEM[: BLOCK_TOKENS + 5]) == {"a": BLOCK_TOKENS}
    assert index.match(SYSTEM[: BLOCK_TOKENS - 1]) == {}
    assert index.match(SYSTEM[1:]) == {}


def test_each_replica_counts_its_own_beginning() -> None:
    index = PrefixIndex()
    index.insert(SYSTEM, "a")
    index.insert((*SYSTEM[:BLOCK_TOKENS], *reversed(SYSTEM)), "b")
    assert index.match(SYSTEM) == {"a": 3 * BLOCK_TOKENS, "b": BLOCK_TOKENS}


def test_a_replica_that_is_gone_is_forgotten() -> None:
    index = PrefixIndex()
    index.insert(SYSTEM, "a")
    index.insert(SYSTEM, "b")
    index.forget("a")
    assert index.match(SYSTEM) == {"b": 3 * BLOCK_TOKENS}
    index.forget("b")
    assert len(index) == 0


def test_the_least_recently_used_blocks_are_forgotten() -> None:
    index = PrefixIndex(capacity_blocks=2)
    first, second, third = (tuple(range(start, start + BLOCK_TOKENS)) for start in (0, 100, 200))
    index.insert(first, "a")
    index.insert(second, "a")
    index.match(first)
    index.insert(third, "a")
    assert index.match(first) and index.match(third)
    assert not index.match(second)


def test_salts_share_nothing() -> None:
    index = PrefixIndex()
    index.insert(SYSTEM, "a", salt="acme")
    assert index.match(SYSTEM, salt="acme") == {"a": 3 * BLOCK_TOKENS}
    assert index.match(SYSTEM) == index.match(SYSTEM, salt="other") == {}


def test_only_the_beginning_of_a_long_prompt_counts() -> None:
    index = PrefixIndex()
    index.insert(range((MAX_BLOCKS + 10) * BLOCK_TOKENS), "a")
    assert len(index) == MAX_BLOCKS


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=6), st.sampled_from("ab")), max_size=20))
def test_it_tells_the_longest_common_beginning(sent: list[tuple[list[int], str]]) -> None:
    """Against the definition, with blocks of equal tokens."""
    index = PrefixIndex()
    for blocks, replica_id in sent:
        index.insert([token for token in blocks for _ in range(BLOCK_TOKENS)], replica_id)
    prompt = [0, 1, 0, 1]
    expected: dict[str, int] = {}
    for blocks, replica_id in sent:
        pairs = enumerate(zip(blocks, prompt, strict=False))
        common = next((i for i, (x, y) in pairs if x != y), min(len(blocks), len(prompt)))
        if common:
            expected[replica_id] = max(expected.get(replica_id, 0), common * BLOCK_TOKENS)
    assert index.match([token for token in prompt for _ in range(BLOCK_TOKENS)]) == expected
