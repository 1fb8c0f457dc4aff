"""Triton twin of the wide end of a truncated draw: rows whose set is larger than the candidates that were ranked.

Legend: N rows, V vocabulary. The rule is that of draw.py: the ``top_k`` likeliest tokens, of these the smallest set
that holds ``top_p`` of their mass, and the token where the draw falls in that set, likeliest first. Nothing is sorted:
each of the three is a threshold, found by bisection over the bits of a float, so that the host need not know which rows
take part. Of equal weights the first ids rank first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
BITS_OF_ONE = tl.constexpr(0x3F800000)  # of the largest weight; weights of 0 and above order like their bits
NUM_HALVINGS = tl.constexpr(30)


def draw_incomplete_(
    tokens: Tensor, complete: Tensor, weights: Tensor, top_k: Tensor, top_p: Tensor, draws: Tensor
) -> None:
    """Overwrite ``tokens`` [N] int64 of the rows that are not ``complete`` [N].

    ``weights`` [N, V] float32, the largest 1; ``top_k`` [N] int64; ``top_p`` [N] float32; ``draws`` [N] float64.
    """
    num_rows, vocab_size = weights.shape
    block = min(BLOCK, triton.next_power_of_2(vocab_size))
    bits = weights.view(torch.int32)
    _draw_kernel[(num_rows,)](
        bits, complete, top_k, top_p, draws, tokens, bits.stride(0), vocab_size, BLOCK=block, num_warps=16
    )


@triton.jit(do_not_specialize=["vocab_size"])
def _draw_kernel(
    bits_ptr, complete_ptr, top_k_ptr, top_p_ptr, draws_ptr, tokens_ptr, row_stride, vocab_size, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(complete_ptr + row) == 0:
        at = bits_ptr + row * row_stride
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row).to(tl.float64)
        edge = tl.program_id(0) * 0  # the least weight in the set, as bits, and how many such are in it
        num_edge = top_k
        mass, _ = above(at, edge, vocab_size, BLOCK)
        if top_k < vocab_size:
            edge = crossing(at, edge, top_k.to(tl.float64) - 0.5, vocab_size, True, BLOCK)
            mass, num_above = above(at, edge, vocab_size, BLOCK)
            num_edge = top_k - num_above
            mass += num_edge.to(tl.float64) * weight_of(edge)
        if top_p < 1:
            limit = top_p * mass
            inner = crossing(at, edge, limit, vocab_size, False, BLOCK)
            mass, _ = above(at, inner, vocab_size, BLOCK)
            num_inner = tl.ceil(tl.maximum(limit - mass, 0.0) / weight_of(inner)).to(tl.int64)
            num_edge = tl.where(inner == edge, tl.minimum(num_inner, num_edge), num_inner)
            edge = inner
            mass += num_edge.to(tl.float64) * weight_of(edge)
        target = tl.load(draws_ptr + row) * mass
        chosen = crossing(at, edge, target, vocab_size, False, BLOCK)
        mass, _ = above(at, chosen, vocab_size, BLOCK)
        place = (tl.maximum(target - mass, 0.0) / weight_of(chosen)).to(tl.int64)
        place = tl.where(chosen == edge, tl.minimum(place, tl.maximum(num_edge - 1, 0)), place)
        tl.store(tokens_ptr + row, nth_of(at, chosen, place, vocab_size, BLOCK))


@triton.jit
def weight_of(bits):
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def crossing(at, least, limit, vocab_size, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest weight, as bits and ``least`` or more, such that those no lighter hold more than ``limit``."""
    low = least
    high = least * 0 + (BITS_OF_ONE + 1)
    for _ in range(NUM_HALVINGS):
        middle = low + (high - low) // 2
        mass, count = above(at, middle - 1, vocab_size, BLOCK)
        holds = (count.to(tl.float64) > limit) if COUNTS else (mass > limit)
        low = tl.where(holds, middle, low)
        high = tl.where(holds, high, middle)
    return low


@triton.jit
def above(at, edge, vocab_size, BLOCK: tl.constexpr):
    """Mass and number of the weights heavier than ``edge``."""
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        bits = tl.load(at + ids, mask=ids < vocab_size, other=0)
        is_above = bits > edge
        mass += tl.where(is_above, bits.to(tl.float32, bitcast=True), 0.0)
        count += is_above.to(tl.int32)
    return tl.sum(mass, axis=0).to(tl.float64), tl.sum(count, axis=0).to(tl.int64)


@triton.jit
def nth_of(at, weight, place, vocab_size, BLOCK: tl.constexpr):
    """The id of the token number ``place`` (or the last) among those of exactly this weight."""
    chosen = place * 0
    num_before = place * 0
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        is_equal = (tl.load(at + ids, mask=ids < vocab_size, other=-1) == weight).to(tl.int64)
        rank = num_before + tl.cumsum(is_equal, axis=0) - 1
        found = tl.max(tl.where((is_equal > 0) & (rank <= place), ids, -1), axis=0)
        chosen = tl.where(found >= 0, found.to(tl.int64), chosen)
        num_before += tl.sum(is_equal, axis=0)
    return chosen
