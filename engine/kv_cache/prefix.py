"""The prefix index: which blocks hold the KV of which token prefix, and at which brownout level it was computed.

A trie with one block of tokens per edge. A node stands for a whole prefix, so a match cannot be wrong: the tokens
themselves are compared, block by block, and no two prefixes share a node as they could share a hash.

Each salt has a trie of its own, below an edge of its own: how fast an answer begins would else tell one tenant what
another one has sent.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence


class PrefixNode:
    """One prefix of full blocks. It lives while it has a block, a longer prefix below it, or a sequence at it."""

    __slots__ = ("block_id", "children", "level", "num_pins", "parent", "tokens")

    def __init__(self, parent: PrefixNode | None, tokens: bytes | str) -> None:
        self.parent = parent
        self.tokens = tokens  # of the last block of the prefix, packed; or the salt, above the first block
        self.children: dict[bytes | str, PrefixNode] = {}
        self.block_id: int | None = None
        self.level = 0  # the highest at which the block or any before it was computed
        self.num_pins = 0

    @property
    def needed(self) -> bool:
        return self.parent is None or self.block_id is not None or bool(self.children) or self.num_pins > 0


class PrefixIndex:
    """Maps token prefixes to blocks. Knows nothing of reference counts: the block manager says what may go."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.root = PrefixNode(None, b"")
        self._node_of_block: dict[int, PrefixNode] = {}

    def __len__(self) -> int:
        return len(self._node_of_block)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._node_of_block

    def origin(self, salt: str) -> PrefixNode:
        """The empty prefix of ``salt``, made if it is new; prune it by pinning and unpinning it."""
        return self._child(self.root, salt) if salt else self.root

    def match(
        self, origin: PrefixNode, token_ids: Sequence[int], max_blocks: int, exact_only: bool
    ) -> list[PrefixNode]:
        """Nodes of the longest chain of registered blocks that ``token_ids`` starts with, at most ``max_blocks``."""
        chain: list[PrefixNode] = []
        node = origin
        for index in range(max_blocks):
            child = node.children.get(self._pack(token_ids, index))
            if child is None or child.block_id is None or (exact_only and child.level > 0):
                break
            chain.append(child)
            node = child
        return chain

    def child(self, node: PrefixNode, token_ids: Sequence[int], index: int) -> PrefixNode:
        """The prefix one block longer than ``node``: with block ``index`` of ``token_ids``, made if it is new."""
        return self._child(node, self._pack(token_ids, index))

    def register(self, node: PrefixNode, block_id: int, level: int) -> int | None:
        """Offer ``block_id`` as the block of ``node``; the first one stays, unless it was computed at a higher level.

        Returns the block that is now unregistered: the offered one, the replaced one, or None.
        """
        replaced = node.block_id
        if replaced is not None and node.level <= level:
            return block_id
        if replaced is not None:
            del self._node_of_block[replaced]
        node.block_id, node.level = block_id, level
        self._node_of_block[block_id] = node
        return replaced

    def unregister(self, block_id: int) -> None:
        node = self._node_of_block.pop(block_id)
        node.block_id = None
        self._prune(node)

    def pin(self, node: PrefixNode) -> None:
        """Keep ``node`` in the trie, with or without a block, until :meth:`unpin`."""
        node.num_pins += 1

    def unpin(self, node: PrefixNode) -> None:
        node.num_pins -= 1
        self._prune(node)

    def registered(self) -> Iterator[tuple[int, PrefixNode]]:
        """``block_id |-> node`` of every registered block."""
        return iter(self._node_of_block.items())

    def _pack(self, token_ids: Sequence[int], index: int) -> bytes:
        start = index * self.block_size
        return array("q", token_ids[start : start + self.block_size]).tobytes()

    @staticmethod
    def _child(node: PrefixNode, edge: bytes | str) -> PrefixNode:
        child = node.children.get(edge)
        if child is None:
            child = node.children[edge] = PrefixNode(node, edge)
        return child

    @staticmethod
    def _prune(node: PrefixNode) -> None:
        while not node.needed and node.parent is not None:
            del node.parent.children[node.tokens]
            node = node.parent
