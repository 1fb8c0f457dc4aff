"""The trie finds the longest registered chain, keeps the better of two blocks, and leaves nothing behind."""

import pytest

from engine.kv_cache.prefix import PrefixIndex, PrefixNode

TOKENS = [1, 2, 3, 4, 5, 6]


@pytest.fixture
def index() -> PrefixIndex:
    return PrefixIndex(block_size=2)


def register_chain(index: PrefixIndex, tokens: list[int], blocks: list[tuple[int, int]]) -> list[PrefixNode]:
    nodes = [index.root]
    for i, (block_id, level) in enumerate(blocks):
        nodes.append(index.child(nodes[-1], tokens, i))
        index.register(nodes[-1], block_id, level)
    return nodes[1:]


def matched_blocks(index: PrefixIndex, tokens: list[int], max_blocks: int = 9, exact_only: bool = False) -> list[int]:
    chain = index.match(index.root, tokens, min(max_blocks, len(tokens) // 2), exact_only)
    return [node.block_id for node in chain]


def test_longest_chain(index):
    register_chain(index, TOKENS, [(7, 0), (8, 0), (9, 0)])
    assert matched_blocks(index, TOKENS) == [7, 8, 9]
    assert matched_blocks(index, TOKENS, max_blocks=2) == [7, 8]
    assert matched_blocks(index, [1, 2, 3, 0, 5, 6]) == [7]
    assert matched_blocks(index, [3, 4, 5, 6]) == []


def test_exact_only_ends_at_the_first_dimmed_block(index):
    register_chain(index, TOKENS, [(7, 0), (8, 2), (9, 2)])
    assert matched_blocks(index, TOKENS) == [7, 8, 9]
    assert matched_blocks(index, TOKENS, exact_only=True) == [7]


@pytest.mark.parametrize(
    ("first_level", "second_level", "unregistered"), [(0, 0, 8), (0, 2, 8), (2, 2, 8), (2, 0, 7), (3, 2, 7), (2, 3, 8)]
)
def test_second_block_of_one_prefix(index, first_level, second_level, unregistered):
    (node,) = register_chain(index, TOKENS, [(7, first_level)])
    assert index.register(node, 8, second_level) == unregistered
    kept = 15 - unregistered
    assert matched_blocks(index, TOKENS) == [kept]
    assert kept in index
    assert unregistered not in index
    assert len(index) == 1


def test_a_chain_is_found_again_when_its_missing_head_returns(index):
    head, _ = register_chain(index, TOKENS, [(7, 0), (8, 0)])
    index.unregister(7)
    assert matched_blocks(index, TOKENS) == []
    assert index.register(head, 9, 0) is None
    assert matched_blocks(index, TOKENS) == [9, 8]


def test_unneeded_nodes_go_away(index):
    nodes = register_chain(index, TOKENS, [(7, 0), (8, 0), (9, 0)])
    index.pin(nodes[1])
    index.unregister(7)
    index.unregister(9)
    index.unregister(8)
    assert nodes[1].children == {}
    assert list(index.root.children.values()) == [nodes[0]]
    index.unpin(nodes[1])
    assert index.root.children == {}
    assert len(index) == 0
