"""What a step begins with: its tokens' embeddings and its positions' rotation."""

from __future__ import annotations

from torch import Tensor

from engine.layers.rotary import RotaryEmbedding


def embed(
    token_ids: Tensor, positions: Tensor, embedding: Tensor, rotary: RotaryEmbedding, dimmed_pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``embedding`` [V, D] -> [T, D], and cos and sin [T, head_dim] float32; zeroes ``dimmed_pairs`` [T]."""
    dimmed_pairs.zero_()
    return embedding[token_ids], *rotary.tables(positions)
