"""The experts of a MoE layer as two grouped matrix products in Triton, and the layer built on them.

Legend: T tokens, E original experts, U united experts, N = E + U, A experts per token, P = T A pairs, D hidden size,
F expert FFN width. Twin of engine.moe.experts and engine.moe.layer. Each tile multiplies the rows of one expert, so a
step reads each active expert once (from L2 for its second tile on) and inactive ones never.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.batch import RowInfo
from engine.layers.fused import silu_and_mul_gated
from engine.moe.align import Alignment, align
from engine.moe.experts import PackedExperts
from engine.moe.fused_routing import choose, rewrite_
from engine.moe.gate import Routing
from engine.moe.layer import MoeLayer
from engine.moe.tiles import MoeTiles, Tile, TileTable


@dataclass(slots=True)
class FusedMoeLayer(MoeLayer):
    """MoeLayer whose result is a stack of addends: the pairs by column [A, T, D], then the shared expert, if any.

    The shared expert runs on ``side``, so that the chain of small routing kernels hides behind it.
    """

    tiles: TileTable
    side: torch.cuda.Stream
    router: Tensor = field(init=False)  # [>= E, D]: both gates in one product, padded to a power of two of rows

    def __post_init__(self) -> None:
        router = self.gate.weight if self.shared_gate is None else torch.cat((self.gate.weight, self.shared_gate))
        num_rows = max(triton.next_power_of_2(len(router)), MIN_ROUTER_ROWS)
        self.router = F.pad(router, (0, 0, 0, num_rows - len(router)))

    def __call__(self, x: Tensor, rows: RowInfo, dimmed_pairs: Tensor) -> Tensor:
        num_experts, num_columns = self.gate.weight.shape[0], self.gate.num_experts_per_token
        num_packed, tiles, dimmer = len(self.experts.gate_up), self.tiles.of(len(x)), self.dimmer
        shared = self.shared_expert
        addends = x.new_empty(num_columns + (shared is not None), *x.shape)
        main = torch.cuda.current_stream()
        if shared is not None:
            self.side.wait_stream(main)
        choice = choose(
            x, self.router, num_experts, num_columns, self.gate.norm_topk_prob, num_packed, rows,
            rank_by_count=dimmer is not None and dimmer.rank_by_count,
        )  # fmt: skip
        if shared is not None:
            chosen = main.record_event()
            with torch.cuda.stream(self.side):
                gate_up = F.linear(x, shared.gate_up)
                self.side.wait_event(chosen)
                hidden = silu_and_mul_gated(gate_up, choice.shared_logits)
                torch.mm(hidden, shared.down.t(), out=addends[num_columns])
        if dimmer is not None:
            rewrite_(dimmer, self.index, choice, rows, dimmed_pairs)
        run_experts(x, choice.routing, self.experts, tiles, addends[:num_columns])
        if shared is not None:
            main.wait_stream(self.side)
        return addends


MIN_ROUTER_ROWS = 16  # the matrix unit's


def run_experts(x: Tensor, routing: Routing, experts: PackedExperts, tiles: MoeTiles, out: Tensor) -> None:
    """out[a, t] = weights[t, a] * expert[ids[t, a]](x[t]), 0 for a pair without an expert. ``out`` [A, T, D]."""
    num_tokens, hidden_size = x.shape
    num_columns = routing.ids.shape[1]
    num_packed, expert_size = len(experts.gate_up), experts.down.shape[2]
    alignment = align(routing.ids, num_packed, tiles.rows)
    hidden = x.new_empty(num_tokens * num_columns, expert_size)
    sizes = ExpertSizes(num_tokens, num_columns, num_packed, hidden_size, expert_size)
    launch_gate_up(x, experts.gate_up, alignment, hidden, sizes, tiles.rows, tiles.gate_up)
    launch_down(hidden, experts.down, routing.weights, alignment, out, sizes, tiles.rows, tiles.down)


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """The letters of one launch."""

    num_tokens: int
    num_columns: int  # A
    num_packed: int  # N
    hidden_size: int  # D
    expert_size: int  # F


def launch_gate_up(
    x: Tensor, gate_up: Tensor, alignment: Alignment, hidden: Tensor, sizes: ExpertSizes, tile_rows: int, tile: Tile
) -> None:
    """hidden[r] = silu(gate(x)) * up(x) of the pair in sorted row r. [T, D], [N, 2F, D] -> [P, F]"""
    num_column_tiles = triton.cdiv(sizes.expert_size, tile.columns)
    _gate_up_kernel[(len(alignment.tiles) * num_column_tiles,)](
        x, _weights(gate_up, tile), alignment.order, alignment.tiles, hidden,
        sizes.num_columns, sizes.num_packed, num_column_tiles,
        K=sizes.hidden_size, SIZE=sizes.expert_size, BULK_COPY=tile.bulk_copy,
        ROWS=tile_rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def launch_down(
    hidden: Tensor, down: Tensor, weights: Tensor, alignment: Alignment, out: Tensor, sizes: ExpertSizes,
    tile_rows: int, tile: Tile,
) -> None:  # fmt: skip
    """out[a, t] = weight * down(hidden) of each pair. [P, F], [N, D, F] -> [A, T, D]"""
    num_column_tiles = triton.cdiv(sizes.hidden_size, tile.columns)
    _down_kernel[(len(alignment.tiles) * num_column_tiles,)](
        hidden, _weights(down, tile), weights, alignment.order, alignment.tiles, out,
        sizes.num_tokens, sizes.num_columns, sizes.num_packed, num_column_tiles,
        K=sizes.expert_size, SIZE=sizes.hidden_size, BULK_COPY=tile.bulk_copy,
        ROWS=tile_rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _weights(table: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    """The packed table [N, rows, K] as a kernel reads it: by pointers, or in boxes of one tile."""
    if tile.bulk_copy:
        return TensorDescriptor.from_tensor(table.flatten(0, 1), [tile.columns, tile.depth])
    return table


@triton.jit(do_not_specialize=["num_columns", "no_expert", "num_column_tiles"])
def _gate_up_kernel(
    x_ptr, weights, order_ptr, tiles_ptr, out_ptr, num_columns, no_expert, num_column_tiles,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + (tl.program_id(0) // num_column_tiles) * 3
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    expert = tl.load(tile).to(tl.int64)
    if (first >= end) | (expert == no_expert):
        return
    rows = first + tl.arange(0, ROWS)
    first_column = (tl.program_id(0) % num_column_tiles) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    tokens = tl.load(order_ptr + rows, mask=rows < end, other=0) // num_columns
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * K + depth[None, :]
    gate_row = expert.to(tl.int32) * 2 * SIZE + first_column
    if not BULK_COPY:  # columns beyond the width wrap around and are not stored
        gate_at = weights + expert * 2 * SIZE * K + (columns % SIZE)[None, :] * K + depth[:, None]
    gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, K, DEPTH):
        inside = depth < K - start
        if K % DEPTH == 0:
            x = tl.load(x_at)
        else:
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
        if BULK_COPY:
            gate_weight = weights.load([gate_row, start]).T
            up_weight = weights.load([gate_row + SIZE, start]).T
        elif K % DEPTH == 0:
            gate_weight = tl.load(gate_at)
            up_weight = tl.load(gate_at + SIZE * K)
            gate_at += DEPTH
        else:
            gate_weight = tl.load(gate_at, mask=inside[:, None], other=0.0)
            up_weight = tl.load(gate_at + SIZE * K, mask=inside[:, None], other=0.0)
            gate_at += DEPTH
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
        x_at += DEPTH
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(out_at, out, mask=(rows < end)[:, None] & (columns < SIZE)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_columns", "no_expert", "num_column_tiles"])
def _down_kernel(
    hidden_ptr, weights, pair_weights_ptr, order_ptr, tiles_ptr, out_ptr,
    num_tokens, num_columns, no_expert, num_column_tiles,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + (tl.program_id(0) // num_column_tiles) * 3
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    expert = tl.load(tile).to(tl.int64)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    first_column = (tl.program_id(0) % num_column_tiles) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
    target = (pairs % num_columns).to(tl.int64) * num_tokens + pairs // num_columns
    out_at = out_ptr + target[:, None] * SIZE + columns[None, :]
    stored = (rows < end)[:, None] & (columns < SIZE)[None, :]
    if expert == no_expert:
        tl.store(out_at, tl.zeros([ROWS, COLUMNS], dtype=out_ptr.dtype.element_ty), mask=stored)
        return
    depth = tl.arange(0, DEPTH)
    hidden_at = hidden_ptr + tl.where(rows < end, rows, first).to(tl.int64)[:, None] * K + depth[None, :]
    weight_row = expert.to(tl.int32) * SIZE + first_column
    if not BULK_COPY:
        weight_at = weights + expert * SIZE * K + (columns % SIZE)[None, :] * K + depth[:, None]
    out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, K, DEPTH):
        inside = depth < K - start
        if K % DEPTH == 0:
            hidden = tl.load(hidden_at)
        else:
            hidden = tl.load(hidden_at, mask=inside[None, :], other=0.0)
        if BULK_COPY:
            weight = weights.load([weight_row, start]).T
        elif K % DEPTH == 0:
            weight = tl.load(weight_at)
            weight_at += DEPTH
        else:
            weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
            weight_at += DEPTH
        out = tl.dot(hidden, weight, out, input_precision="ieee")
        hidden_at += DEPTH
    out *= tl.load(pair_weights_ptr + pairs, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=stored)
