"""Which replicas have probably cached the beginning of a prompt: those to which this process sent such prompts. Pure.

Prompts are cut into blocks of BLOCK_TOKENS; a block's key hashes it together with all blocks before it and the salt of
the request, so equal keys mean equal beginnings that may be shared. The least recently used keys are forgotten: so does
the replica's own cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 64
MAX_BLOCKS = 64  # of one prompt that are looked at; the beginning is what prompts share
CAPACITY_BLOCKS = 65_536


class PrefixIndex:
    def __init__(self, capacity_blocks: int = CAPACITY_BLOCKS) -> None:
        self._capacity_blocks = capacity_blocks
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()  # block key |-> replicas that were sent it

    def match(self, prompt_ids: Sequence[int], salt: str = "") -> dict[str, int]:
        """replica_id |-> tokens of the prompt's beginning that it has probably cached; absent: none."""
        cached: dict[str, int] = {}
        candidates: set[str] | None = None
        for number, key in enumerate(_keys(prompt_ids, salt), start=1):
            holders = self._replicas.get(key)
            if not holders:
                break
            candidates = set(holders) if candidates is None else candidates & holders
            if not candidates:
                break
            self._replicas.move_to_end(key)
            cached |= dict.fromkeys(candidates, number * BLOCK_TOKENS)
        return cached

    def insert(self, prompt_ids: Sequence[int], replica_id: str, salt: str = "") -> None:
        """The replica was sent this prompt."""
        for key in _keys(prompt_ids, salt):
            self._replicas.setdefault(key, set()).add(replica_id)
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._capacity_blocks:
            self._replicas.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """The replica is gone, and its cache with it."""
        for key, holders in list(self._replicas.items()):
            holders.discard(replica_id)
            if not holders:
                del self._replicas[key]

    def __len__(self) -> int:
        return len(self._replicas)


def _keys(prompt_ids: Sequence[int], salt: str) -> Iterator[int]:
    """One key for each whole block, from the first."""
    key = hash(salt)
    for start in range(0, min(len(prompt_ids), MAX_BLOCKS * BLOCK_TOKENS) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = hash((key, tuple(prompt_ids[start : start + BLOCK_TOKENS])))
        yield key
