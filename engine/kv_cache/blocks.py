"""The block manager: who holds which block of the paged KV cache, and which blocks can be used again.

Every block but 0 is in exactly one state:

    free       holds nothing worth keeping
    evictable  registered in the prefix index, held by no live sequence; the least recently used goes first
    used       held by one or more live sequences, registered or not

Block 0 is the padding block: rows that pad a batch write there, and no sequence ever gets it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.kv_cache.prefix import PrefixIndex, PrefixNode


@dataclass(slots=True)
class _SequenceBlocks:
    """One live sequence. ``cursor`` is the prefix of its full blocks; None once it may no longer register any."""

    cursor: PrefixNode | None
    table: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens with KV
    level: int = 0  # the highest at which any of that KV was computed


class BlockManager:
    """Hands out blocks of ``block_size`` tokens; ``num_blocks`` counts the padding block too."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._prefix = PrefixIndex(block_size)
        self._sequences: dict[str, _SequenceBlocks] = {}
        self._num_refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks held by live sequences."""
        return self.num_blocks - 1 - self.num_free

    @property
    def used_frac(self) -> float:
        return self.num_used / (self.num_blocks - 1)

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix index, used or evictable."""
        return len(self._prefix)

    def start(self, request_id: str, token_ids: Sequence[int], exact_only: bool, salt: str = "") -> int:
        """Open a sequence and attach the longest cached chain of full blocks; returns the tokens it covers.

        At least the last token is left to compute, for its logits. With ``exact_only`` only blocks computed wholly
        undimmed, with their prefix, are taken. Blocks are shared with sequences of the same ``salt``. Raises
        ValueError if the sequence is already open.
        """
        if request_id in self._sequences:
            raise ValueError(f"sequence {request_id} is already open")
        sequence = self._sequences[request_id] = _SequenceBlocks(cursor=None)
        if not self.prefix_caching:
            return 0
        origin = self._prefix.origin(salt)
        chain = self._prefix.match(origin, token_ids, (len(token_ids) - 1) // self.block_size, exact_only)
        for node in chain:
            assert node.block_id is not None
            self._acquire(node.block_id)
            sequence.table.append(node.block_id)
            sequence.level = max(sequence.level, node.level)
        sequence.num_computed = len(chain) * self.block_size
        self._move_cursor(sequence, chain[-1] if chain else origin)
        return sequence.num_computed

    def reserve(self, request_id: str, num_tokens: int) -> bool:
        """Make the sequence's table long enough for ``num_tokens`` tokens in total, or change nothing."""
        table = self._sequences[request_id].table
        num_missing = self._num_blocks_of(num_tokens) - len(table)
        if num_missing > self.num_free:
            return False
        for _ in range(num_missing):
            block_id = self._take()
            self._num_refs[block_id] = 1
            table.append(block_id)
        return True

    def commit(self, request_id: str, token_ids: Sequence[int], num_computed: int, level: int) -> None:
        """Record that the sequence's first ``num_computed`` tokens have KV; those not recorded before were computed at
        brownout ``level``. Blocks that became full enter the prefix index. Costs O(new tokens).

        ``token_ids`` are the sequence's tokens from its start. Raises ValueError if the count goes back, or beyond
        the tokens or the reserved blocks.
        """
        sequence = self._sequences[request_id]
        limit = min(len(token_ids), len(sequence.table) * self.block_size)
        if not sequence.num_computed <= num_computed <= limit:
            raise ValueError(
                f"sequence {request_id}: num_computed must be in [{sequence.num_computed}, {limit}], got {num_computed}"
            )
        if num_computed > sequence.num_computed:
            sequence.level = max(sequence.level, level)
        newly_full = range(sequence.num_computed // self.block_size, num_computed // self.block_size)
        sequence.num_computed = num_computed
        if sequence.cursor is None or not newly_full:
            return
        node = sequence.cursor
        for index in newly_full:
            node = self._prefix.child(node, token_ids, index)
            unregistered = self._prefix.register(node, sequence.table[index], sequence.level)
            if unregistered is not None and unregistered in self._evictable:
                del self._evictable[unregistered]
                self._free.append(unregistered)
        self._move_cursor(sequence, node)

    def free(self, request_id: str) -> None:
        """Close a sequence. Its registered blocks stay for later requests; of these, the tail is evicted first."""
        sequence = self._sequences.pop(request_id)
        self._move_cursor(sequence, None)
        for block_id in reversed(sequence.table):
            self._num_refs[block_id] -= 1
            if self._num_refs[block_id]:
                continue
            if block_id in self._prefix:
                self._evictable[block_id] = None
            else:
                self._free.append(block_id)

    def level(self, request_id: str) -> int:
        """The highest brownout level at which any of the sequence's KV was computed, reused KV included."""
        return self._sequences[request_id].level

    def block_ids(self, request_id: str, first: int = 0) -> list[int]:
        """The sequence's block table from entry ``first`` on: entry i holds tokens [i, i + 1) * block_size."""
        return self._sequences[request_id].table[first:]

    def check_invariants(self) -> None:
        """Raise AssertionError, in a sentence, if the books do not balance. Costs O(blocks); for tests."""
        num_holders = Counter(block_id for sequence in self._sequences.values() for block_id in sequence.table)
        for block_id, num_refs in enumerate(self._num_refs):
            assert num_refs == num_holders[block_id], (
                f"block {block_id} counts {num_refs} references, but {num_holders[block_id]} tables hold it"
            )
        states = Counter([*self._free, *self._evictable, *num_holders])
        assert states == Counter(range(1, self.num_blocks)), "a block other than 0 is not in exactly one state"
        for block_id in self._free:
            assert block_id not in self._prefix, f"free block {block_id} is still in the prefix index"
        for block_id in self._evictable:
            assert block_id in self._prefix, f"evictable block {block_id} is not in the prefix index"
        for request_id, sequence in self._sequences.items():
            assert sequence.num_computed <= len(sequence.table) * self.block_size, (
                f"sequence {request_id} computed {sequence.num_computed} tokens but has {len(sequence.table)} blocks"
            )
            assert len(set(sequence.table)) == len(sequence.table), f"sequence {request_id} holds a block twice"
        self._check_prefix()

    def _check_prefix(self) -> None:
        num_pins: Counter[PrefixNode] = Counter(
            sequence.cursor for sequence in self._sequences.values() if sequence.cursor is not None
        )
        nodes, unvisited = {self._prefix.root}, [self._prefix.root]
        while unvisited:
            node = unvisited.pop()
            assert node.needed, "the prefix index keeps a node that nothing needs"
            assert node.num_pins == num_pins[node], f"a node counts {node.num_pins} pins, not {num_pins[node]}"
            unvisited.extend(node.children.values())
            nodes.update(node.children.values())
        assert nodes >= set(num_pins), "a live sequence's prefix is no longer in the prefix index"
        for block_id, node in self._prefix.registered():
            assert node in nodes and node.block_id == block_id, f"block {block_id} is registered but cannot be found"
        assert len(self._prefix) == sum(node.block_id is not None for node in nodes), "a found block is not registered"

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _acquire(self, block_id: int) -> None:
        self._num_refs[block_id] += 1
        self._evictable.pop(block_id, None)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block_id, _ = self._evictable.popitem(last=False)
        self._prefix.unregister(block_id)
        return block_id

    def _move_cursor(self, sequence: _SequenceBlocks, node: PrefixNode | None) -> None:
        if node is not None:
            self._prefix.pin(node)
        if sequence.cursor is not None:
            self._prefix.unpin(sequence.cursor)
        sequence.cursor = node
