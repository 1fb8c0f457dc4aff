"""The block manager against a model of the memory it manages.

The model plays the engine: it writes into each slot of each block which token prefix of which salt the KV there was
computed from, and whether any of it was dimmed. Whatever the manager hands out as cached must then really be there.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.kv_cache.blocks import BlockManager

BLOCK_SIZE = 2
NUM_BLOCKS = 12


class Sequence:
    def __init__(self, token_ids: list[int], num_computed: int, exact_only: bool, salt: str) -> None:
        self.token_ids = token_ids
        self.salt = salt
        self.num_computed = num_computed
        self.exact_only = exact_only
        self.level = 0

    def prefix(self, length: int) -> tuple[str, ...]:
        return (self.salt, *map(str, self.token_ids[:length]))


class BlockManagerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.memory: dict[tuple[int, int], tuple[tuple[str, ...], int]] = {}  # (block, offset) -> (prefix, level)
        self.live: dict[str, Sequence] = {}
        self.num_started = 0

    def slot(self, request_id: str, position: int) -> tuple[int, int]:
        return self.manager.block_ids(request_id)[position // BLOCK_SIZE], position % BLOCK_SIZE

    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        exact_only=st.booleans(),
        salt=st.sampled_from(["", "", "a"]),
    )
    def start(self, token_ids, exact_only, salt):
        request_id = f"r{self.num_started}"
        self.num_started += 1
        num_cached = self.manager.start(request_id, token_ids, exact_only, salt)
        assert num_cached % BLOCK_SIZE == 0
        assert num_cached < len(token_ids)
        sequence = self.live[request_id] = Sequence(list(token_ids), num_cached, exact_only, salt)
        for position in range(num_cached):
            prefix, level = self.memory[self.slot(request_id, position)]
            assert prefix == sequence.prefix(position + 1)
            assert not (exact_only and level)
            sequence.level = max(sequence.level, level)
        assert self.manager.level(request_id) == sequence.level

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(0, 26))
    def reserve(self, data, num_tokens):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        before, num_free = self.manager.block_ids(request_id), self.manager.num_free
        num_missing = max(0, -(-num_tokens // BLOCK_SIZE) - len(before))
        assert self.manager.reserve(request_id, num_tokens) == (num_missing <= num_free)
        after = self.manager.block_ids(request_id)
        assert after[: len(before)] == before
        assert len(after) - len(before) == (num_missing if num_missing <= num_free else 0)
        assert num_free - self.manager.num_free == len(after) - len(before)
        assert 0 not in after

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_new=st.integers(0, 5), level=st.integers(0, 2), new_token=st.integers(0, 1))
    def commit(self, data, num_new, level, new_token):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        sequence = self.live[request_id]
        capacity = len(self.manager.block_ids(request_id)) * BLOCK_SIZE
        num_computed = min(sequence.num_computed + num_new, len(sequence.token_ids), capacity)
        level = 0 if sequence.exact_only else level
        if num_computed > sequence.num_computed:
            sequence.level = max(sequence.level, level)
        for position in range(sequence.num_computed, num_computed):
            self.memory[self.slot(request_id, position)] = (sequence.prefix(position + 1), sequence.level)
        self.manager.commit(request_id, sequence.token_ids, num_computed, level)
        sequence.num_computed = num_computed
        if num_computed == len(sequence.token_ids):
            sequence.token_ids.append(new_token)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.manager.free(request_id)
        del self.live[request_id]

    @invariant()
    def books_balance(self):
        self.manager.check_invariants()
        held = {block_id for request_id in self.live for block_id in self.manager.block_ids(request_id)}
        assert self.manager.num_used == len(held)
        assert self.manager.num_used + self.manager.num_free == NUM_BLOCKS - 1

    @invariant()
    def nobody_overwrote_a_live_sequence(self):
        for request_id, sequence in self.live.items():
            for position in range(sequence.num_computed):
                prefix, level = self.memory[self.slot(request_id, position)]
                assert prefix == sequence.prefix(position + 1)
                assert not (sequence.exact_only and level)
            assert self.manager.level(request_id) == sequence.level


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.fixture
def manager() -> BlockManager:
    return BlockManager(num_blocks=9, block_size=4)


def run(manager: BlockManager, request_id: str, token_ids: list[int], level: int = 0, **start) -> int:
    """Open a sequence and compute all of it; returns its cached tokens."""
    num_cached = manager.start(request_id, token_ids, start.get("exact_only", False))
    assert manager.reserve(request_id, len(token_ids))
    manager.commit(request_id, token_ids, len(token_ids), level)
    manager.check_invariants()
    return num_cached


def test_a_prompt_is_reused_but_for_its_last_token(manager):
    prompt = list(range(8))
    assert run(manager, "a", prompt) == 0
    first_table = manager.block_ids("a")
    assert manager.start("b", prompt, exact_only=True) == 4  # not 8: the last token's logits are needed
    assert manager.start("c", [*prompt, 9], exact_only=True) == 8
    assert manager.block_ids("c") == first_table
    assert (manager.num_used, manager.num_free, manager.num_cached) == (2, 6, 2)
    assert manager.used_frac == 2 / 8


def test_salts_share_no_prefix_and_leave_nothing_behind(manager):
    prompt = list(range(8))
    for number, salt in enumerate(["", "acme", "other"]):
        assert manager.start(f"first {salt}", prompt, exact_only=False, salt=salt) == 0
        assert manager.reserve(f"first {salt}", 8)
        manager.commit(f"first {salt}", prompt, 8, level=0)
        assert manager.start(f"again {salt}", [*prompt, 9], exact_only=False, salt=salt) == 8
        assert manager.num_cached == 2 * (number + 1)
        manager.check_invariants()
    for salt in ("", "acme", "other"):
        manager.free(f"first {salt}")
        manager.free(f"again {salt}")
    assert manager.num_used == 0
    manager.start("big", [1], exact_only=False, salt="new")
    assert manager.reserve("big", 32)  # which evicts all of them
    manager.free("big")
    manager.check_invariants()
    assert not manager._prefix.root.children


def test_generated_tokens_are_reused_too(manager):
    tokens = list(range(6))
    run(manager, "a", tokens)
    for token in (6, 7, 8):
        tokens.append(token)
        manager.reserve("a", len(tokens))
        manager.commit("a", tokens, len(tokens), level=0)
    manager.free("a")
    assert manager.start("b", tokens, exact_only=False) == 8


def test_one_dimmed_token_taints_its_block_and_all_after_it(manager):
    tokens = list(range(13))
    manager.start("a", tokens, exact_only=False)
    manager.reserve("a", 13)
    for num_computed, level in [(5, 0), (6, 2), (13, 1)]:
        manager.commit("a", tokens, num_computed, level)
    assert manager.level("a") == 2
    assert manager.start("full", tokens, exact_only=True) == 4
    assert manager.start("standard", tokens, exact_only=False) == 12


def test_blocks_after_a_reused_dimmed_block_are_dimmed(manager):
    run(manager, "a", list(range(5)), level=2)
    assert run(manager, "b", list(range(9)), level=0) == 4
    manager.free("a")
    manager.free("b")
    assert manager.start("full", list(range(10)), exact_only=True) == 0


def test_a_tail_computed_after_a_dimmed_head_stays_dimmed_when_an_exact_head_replaces_it(manager):
    run(manager, "dimmed head", list(range(5)), level=2)
    assert run(manager, "tail", list(range(9)), level=0) == 4
    assert run(manager, "exact head", list(range(5)), exact_only=True) == 0
    assert manager.start("full", list(range(9)), exact_only=True) == 4
    assert manager.start("standard", list(range(9)), exact_only=False) == 8


def test_an_exact_block_takes_the_place_of_a_dimmed_one(manager):
    tokens = list(range(5))
    run(manager, "a", tokens, level=2)
    manager.free("a")
    assert run(manager, "b", tokens, exact_only=True) == 0
    assert manager.num_cached == 1
    assert run(manager, "c", tokens, exact_only=True) == 4
    assert manager.num_free == 8 - len({*manager.block_ids("b"), *manager.block_ids("c")})


def test_an_empty_commit_taints_nothing(manager):
    tokens = list(range(9))
    run(manager, "a", tokens[:4])
    manager.commit("a", tokens, 4, level=2)
    manager.reserve("a", 9)
    manager.commit("a", tokens, 9, level=0)
    assert manager.start("full", tokens, exact_only=True) == 8


def test_reserve_is_all_or_nothing(manager):
    run(manager, "a", list(range(16)))
    manager.start("b", [1], exact_only=False)
    assert not manager.reserve("b", 17)
    assert manager.block_ids("b") == []
    assert manager.reserve("b", 16)
    assert manager.num_free == 0
    assert manager.reserve("b", 16)


def test_tails_are_evicted_before_heads_and_old_before_new(manager):
    old, new = list(range(100, 113)), list(range(200, 213))
    run(manager, "old", old)
    run(manager, "new", new)
    manager.free("old")
    manager.free("new")
    manager.start("big", [1], exact_only=False)
    manager.reserve("big", 4 * 4)  # two blocks were never registered (the partial tails); two are evicted
    manager.check_invariants()
    assert manager.start("old again", old, exact_only=False) == 4
    assert manager.start("new again", new, exact_only=False) == 12


def test_use_makes_a_prefix_recent(manager):
    first, second = list(range(100, 113)), list(range(200, 213))
    run(manager, "first", first)
    run(manager, "second", second)
    for request_id in ("first", "second"):
        manager.free(request_id)
    manager.start("touch", first, exact_only=False)
    manager.free("touch")
    manager.start("big", [1], exact_only=False)
    manager.reserve("big", 5 * 4)
    assert manager.start("second again", second, exact_only=False) == 0
    assert manager.start("first again", first, exact_only=False) == 12


def test_without_prefix_caching_nothing_is_kept():
    manager = BlockManager(num_blocks=9, block_size=4, prefix_caching=False)
    run(manager, "a", list(range(8)))
    manager.free("a")
    assert manager.num_cached == 0
    assert manager.start("b", list(range(9)), exact_only=False) == 0


def test_misuse_is_refused(manager):
    run(manager, "a", list(range(5)))
    with pytest.raises(ValueError, match="already open"):
        manager.start("a", [1], exact_only=False)
    for num_computed in (4, 6):
        with pytest.raises(ValueError, match=r"num_computed must be in \[5, 5\]"):
            manager.commit("a", list(range(5)), num_computed, level=0)
    with pytest.raises(ValueError, match=r"must be in \[5, 8\]"):
        manager.commit("a", list(range(20)), 9, level=0)
    with pytest.raises(KeyError):
        manager.free("b")
    manager.check_invariants()


def test_check_invariants_notices_a_broken_book(manager):
    run(manager, "a", list(range(5)))
    manager._num_refs[manager.block_ids("a")[0]] += 1
    with pytest.raises(AssertionError, match="counts 2 references"):
        manager.check_invariants()
