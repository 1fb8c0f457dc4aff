"""The paged backend against a dense softmax, one query and one head at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.base import Attention
from engine.attention.sdpa import SdpaAttention
from engine.batch import AttentionMetadata, StepRows, to_device
from engine.types import Levels

HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 8, 4, 40
SDPA = Attention(SdpaAttention(), SdpaAttention())


def metadata_of(chunks: list[tuple[int, int]], seed: int) -> AttentionMetadata:
    """Sequences of (context tokens, rows), decodes first, whose blocks lie scattered over the pool."""
    pool = list(range(1, NUM_BLOCKS))
    random.Random(seed).shuffle(pool)
    tables = np.zeros((len(chunks), NUM_BLOCKS), dtype=np.int32)
    for table, (context, _) in zip(tables, chunks, strict=True):
        num_blocks = -(-context // BLOCK_SIZE)
        table[:num_blocks] = [pool.pop() for _ in range(num_blocks)]
    contexts, counts = (np.array(column) for column in zip(*chunks, strict=True))
    everyone = np.ones(len(chunks), dtype=bool)
    rows = StepRows(
        num_decodes=int((counts == 1).sum()),
        places=np.arange(len(chunks)),
        starts=contexts - counts,
        counts=counts,
        samples=everyone,
        num_logits=np.ones(len(chunks), dtype=int),
        exact=~everyone,
        tables=tables,
        token_ids=np.zeros(counts.sum(), dtype=np.int64),
    )
    return to_device(rows, BLOCK_SIZE, Levels(), torch.device("cpu")).attention


def dense(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    out, row = torch.empty_like(q), 0
    group = q.shape[1] // keys.shape[2]
    for sequence, (rows, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        table = metadata.block_table[sequence].tolist()
        for offset in range(rows):
            visible = range(context - rows + offset + 1)
            where = [(table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in visible]
            for head in range(q.shape[1]):
                k = torch.stack([keys[block, slot, head // group] for block, slot in where])
                v = torch.stack([values[block, slot, head // group] for block, slot in where])
                out[row, head] = torch.softmax(k @ q[row, head] / HEAD_DIM**0.5, dim=0) @ v
            row += 1
    return out


@settings(max_examples=20)
@given(
    decode_contexts=st.lists(st.integers(1, 17), max_size=4),
    prefills=st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), max_size=3),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    seed=st.integers(0, 1000),
)
def test_equals_dense_attention(
    decode_contexts: list[int], prefills: list[tuple[int, int]], heads: tuple[int, int], seed: int
) -> None:
    chunks = [(context, 1) for context in decode_contexts] + [(before + rows, rows) for rows, before in prefills]
    if not chunks:
        return
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    metadata = metadata_of(chunks, seed)
    keys, values = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM, generator=generator)
    queries = torch.randn(sum(metadata.query_lens), num_heads, HEAD_DIM, generator=generator)
    out = SDPA.forward(queries, keys, values, metadata)
    torch.testing.assert_close(out, dense(queries, keys, values, metadata), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [1, BLOCK_SIZE, BLOCK_SIZE + 1])
def test_padding_and_later_slots_are_not_seen(context: int) -> None:
    metadata = metadata_of([(context, 1), (3 * BLOCK_SIZE, 1)], seed=0)
    keys, values = torch.randn(2, NUM_BLOCKS, BLOCK_SIZE, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    queries = torch.ones(2, 1, HEAD_DIM)
    before = SDPA.forward(queries, keys, values, metadata)
    table = metadata.block_table[0].tolist()
    for position in range(context, 3 * BLOCK_SIZE):
        block = table[position // BLOCK_SIZE]
        keys[block, position % BLOCK_SIZE] = values[block, position % BLOCK_SIZE] = 1e4
    after = SDPA.forward(queries, keys, values, metadata)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
