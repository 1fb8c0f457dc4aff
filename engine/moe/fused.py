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
from engine.layers.fused_linear import MAX_ROWS, launch_linear, num_splits
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs
from engine.layers.linear import GatedMlp
from engine.moe.align import Alignment, align
from engine.moe.dimmer_kernels import rewrite_
from engine.moe.experts import PackedExperts
from engine.moe.fused_routing import choose
from engine.moe.gate import Routing
from engine.moe.layer import MoeLayer
from engine.moe.tiles import MoeTiles, Tile, TileTable

HALVED_ROWS = 32  # tiles of so many rows run as half of it when at most half full, by the same matrix instruction


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
        num_shared = 0 if shared is None else num_splits(len(x)) if len(x) <= MAX_ROWS else 1
        addends = x.new_empty(num_columns + num_shared, *x.shape)
        main = torch.cuda.current_stream()
        if shared is not None:
            self.side.wait_stream(main)
        dimmer = None if rows.host_levels == (0, 0) else dimmer
        choice = choose(
            x, self.router, num_experts, num_columns, self.gate.norm_topk_prob, num_packed, rows, dimmer, self.index
        )
        chosen = main.record_event()
        if dimmer is not None and choice.use is not None:
            rewrite_(dimmer, self.index, choice.routing, choice.use, rows, dimmed_pairs)
        load = None if self.counter is None else self.counter.totals(self.index)
        alignment = align(choice.routing.ids, num_packed, tiles.rows, load)
        if shared is not None:
            # Not before the chain above: of a kernel's successors in a graph only the first may start before its end.
            with torch.cuda.stream(self.side):
                self._run_shared_expert(shared, x, choice.shared_logits, chosen, addends[num_columns:])
        run_experts(x, choice.routing, alignment, self.experts, tiles, addends[:num_columns])
        if shared is not None:
            main.wait_stream(self.side)
        return addends

    def _run_shared_expert(
        self, expert: GatedMlp, x: Tensor, logits: Tensor, chosen: torch.cuda.Event, out: Tensor
    ) -> None:
        """out.sum(0) = sigmoid(logits) * expert(x); ``logits`` are there once ``chosen`` is."""
        if len(x) <= MAX_ROWS:
            hidden = x.new_empty(1, len(x), expert.down.shape[1])
            launch_linear(x, expert.gate_up, hidden, gated=True)
            self.side.wait_event(chosen)
            launch_linear(hidden[0], expert.down, out, row_logits=logits)
            return
        products = F.linear(x, expert.gate_up)
        self.side.wait_event(chosen)
        torch.mm(silu_and_mul_gated(products, logits), expert.down.t(), out=out[0])


MIN_ROUTER_ROWS = 16  # the matrix unit's


def run_experts(
    x: Tensor, routing: Routing, alignment: Alignment, experts: PackedExperts, tiles: MoeTiles, out: Tensor
) -> None:
    """out[a, t] = weights[t, a] * expert[ids[t, a]](x[t]), 0 for a pair without an expert. ``out`` [A, T, D].

    ``alignment``: that of ``routing.ids`` into tiles of ``tiles.rows``.
    """
    num_tokens, hidden_size = x.shape
    num_columns = routing.ids.shape[1]
    num_packed, expert_size = len(experts.gate_up), experts.down.shape[2]
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
    _gate_up_kernel[(num_programs(len(alignment.tiles) * num_column_tiles, tile_rows, 2, tile, x.device),)](
        x, _weights(gate_up.unflatten(1, (2, -1)), tile), alignment.order, alignment.tiles, alignment.num_tiles, hidden,
        sizes.num_columns, sizes.num_packed, num_column_tiles,
        K=sizes.hidden_size, SIZE=sizes.expert_size, BULK_COPY=tile.bulk_copy,
        ROWS=tile_rows, HALVES=tile_rows == HALVED_ROWS,
        COLUMNS=tile.columns, DEPTH=tile.depth * 2 // x.element_size(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(x.device),
    )  # fmt: skip


def launch_down(
    hidden: Tensor, down: Tensor, weights: Tensor, alignment: Alignment, out: Tensor, sizes: ExpertSizes,
    tile_rows: int, tile: Tile,
) -> None:  # fmt: skip
    """out[a, t] = weight * down(hidden) of each pair. [P, F], [N, D, F] -> [A, T, D]"""
    num_column_tiles = triton.cdiv(sizes.hidden_size, tile.columns)
    halves = tile_rows == HALVED_ROWS
    bulk_rows = tile.bulk_copy and not halves
    _down_kernel[(num_programs(len(alignment.tiles) * num_column_tiles, tile_rows, 1, tile, hidden.device),)](
        _rows(hidden, tile_rows, tile) if bulk_rows else hidden, _weights(down, tile), weights,
        alignment.order, alignment.tiles, alignment.num_tiles, out,
        sizes.num_tokens, sizes.num_columns, sizes.num_packed, num_column_tiles,
        K=sizes.expert_size, SIZE=sizes.hidden_size, BULK_COPY=tile.bulk_copy, BULK_ROWS=bulk_rows,
        ROWS=tile_rows, HALVES=halves,
        COLUMNS=tile.columns, DEPTH=tile.depth * 2 // hidden.element_size(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **launch_options(out.device),
    )  # fmt: skip


def num_programs(max_work: int, tile_rows: int, products: int, tile: Tile, device: torch.device) -> int:
    """As many as the card holds at once; each takes every so-manieth tile, so that unused tiles cost nothing."""
    if device.type != "cuda":
        return min(max_work, 7)
    card = torch.cuda.get_device_properties(device)
    is_pipelined_deeper = tile_rows >= 64 and card.major >= 9  # Hopper's matrix instruction reads shared memory itself
    num_buffers = tile.num_stages - (not is_pipelined_deeper)
    shared_bytes = (tile_rows + products * tile.columns) * tile.depth * 2 * num_buffers
    per_core = max(1, min(card.shared_memory_per_multiprocessor // shared_bytes, 16 // tile.num_warps))
    return min(max_work, per_core * card.multi_processor_count)


def _weights(table: Tensor, tile: Tile) -> Tensor | TensorDescriptor:
    """The packed table [N, (gate and up,) rows, K] as a kernel reads it: by pointers, or in boxes of one tile."""
    if not tile.bulk_copy:
        return table
    depth = tile.depth * 2 // table.element_size()
    return TensorDescriptor.from_tensor(table.flatten(0, 1), [*table.shape[1:-2], tile.columns, depth])


def _rows(rows: Tensor, tile_rows: int, tile: Tile) -> TensorDescriptor:
    """Sorted rows [P, K] in boxes of one tile: those of the next expert come along, and are not stored."""
    return TensorDescriptor.from_tensor(rows, [tile_rows, tile.depth * 2 // rows.element_size()])


@triton.jit(do_not_specialize=["num_columns", "no_expert", "num_column_tiles"])
def _gate_up_kernel(
    x_ptr, weights, order_ptr, tiles_ptr, num_tiles_ptr, out_ptr, num_columns, no_expert, num_column_tiles,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr,
    ROWS: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_column_tiles, tl.num_programs(0)):
        tile = tiles_ptr + (work // num_column_tiles) * 3
        expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        first_column = (work % num_column_tiles) * COLUMNS
        if expert != no_expert:
            if HALVES and end - first <= ROWS // 2:
                _gate_up_tile(x_ptr, weights, order_ptr, out_ptr, num_columns, expert, first, end, first_column,
                              K, SIZE, BULK_COPY, ROWS // 2, COLUMNS, DEPTH)  # fmt: skip
            else:
                _gate_up_tile(x_ptr, weights, order_ptr, out_ptr, num_columns, expert, first, end, first_column,
                              K, SIZE, BULK_COPY, ROWS, COLUMNS, DEPTH)  # fmt: skip
    let_next_start(DEPENDENT)  # not before: the next product would take the shared expert's places


@triton.jit
def _load_rows(rows_at, is_row, inside, IS_WHOLE: tl.constexpr):
    """One step of the inner loop's part of the rows; ``inside``: where the last one ends, unless all are whole."""
    if IS_WHOLE:
        return tl.load(rows_at, mask=is_row, other=0.0)
    return tl.load(rows_at, mask=is_row & inside[None, :], other=0.0)


@triton.jit
def _gate_up_tile(
    x_ptr, weights, order_ptr, out_ptr, num_columns, expert, first, end, first_column,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, DEPTH)
    rows = first + tl.arange(0, ROWS)
    is_row = (rows < end)[:, None]
    columns = first_column + tl.arange(0, COLUMNS)
    tokens = tl.load(order_ptr + rows, mask=rows < end, other=0) // num_columns
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * K + depth[None, :]
    if BULK_COPY:  # one product twice as wide: each row is read once for both
        both = tl.zeros([ROWS, 2 * COLUMNS], dtype=tl.float32)
        for start in range(0, K, DEPTH):
            x = _load_rows(x_at, is_row, depth < K - start, K % DEPTH == 0)
            weight = weights.load([expert * 2, first_column, start]).reshape(2 * COLUMNS, DEPTH)
            both = tl.dot(x, weight.T, both, input_precision="ieee")
            x_at += DEPTH
        gate, up = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    else:  # columns beyond the width wrap around and are not stored
        gate_at = weights + expert.to(tl.int64) * 2 * SIZE * K + (columns % SIZE)[None, :] * K + depth[:, None]
        gate = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for start in range(0, K, DEPTH):
            inside = depth < K - start
            x = _load_rows(x_at, is_row, inside, K % DEPTH == 0)
            if K % DEPTH == 0:
                gate_weight = tl.load(gate_at)
                up_weight = tl.load(gate_at + SIZE * K)
            else:
                gate_weight = tl.load(gate_at, mask=inside[:, None], other=0.0)
                up_weight = tl.load(gate_at + SIZE * K, mask=inside[:, None], other=0.0)
            gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
            up = tl.dot(x, up_weight, up, input_precision="ieee")
            gate_at += DEPTH
            x_at += DEPTH
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(out_at, out, mask=is_row & (columns < SIZE)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_columns", "no_expert", "num_column_tiles"])
def _down_kernel(
    hidden, weights, pair_weights_ptr, order_ptr, tiles_ptr, num_tiles_ptr, out_ptr,
    num_tokens, num_columns, no_expert, num_column_tiles,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr, BULK_ROWS: tl.constexpr,
    ROWS: tl.constexpr, HALVES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    for work in range(tl.program_id(0), tl.load(num_tiles_ptr) * num_column_tiles, tl.num_programs(0)):
        tile = tiles_ptr + (work // num_column_tiles) * 3
        expert, first, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        first_column = (work % num_column_tiles) * COLUMNS
        if HALVES and end - first <= ROWS // 2:
            _down_tile(
                hidden, weights, pair_weights_ptr, order_ptr, out_ptr, num_tokens, num_columns, no_expert,
                expert, first, end, first_column, K, SIZE, BULK_COPY, BULK_ROWS, ROWS // 2, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            _down_tile(
                hidden, weights, pair_weights_ptr, order_ptr, out_ptr, num_tokens, num_columns, no_expert,
                expert, first, end, first_column, K, SIZE, BULK_COPY, BULK_ROWS, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip


@triton.jit
def _down_tile(
    hidden, weights, pair_weights_ptr, order_ptr, out_ptr, num_tokens, num_columns, no_expert,
    expert, first, end, first_column,
    K: tl.constexpr, SIZE: tl.constexpr, BULK_COPY: tl.constexpr, BULK_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, DEPTH)
    rows = first + tl.arange(0, ROWS)
    is_row = (rows < end)[:, None]
    columns = first_column + tl.arange(0, COLUMNS)
    pairs = tl.load(order_ptr + rows, mask=rows < end, other=0)
    out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if expert != no_expert:
        if not BULK_ROWS:
            hidden_at = hidden + rows.to(tl.int64)[:, None] * K + depth[None, :]
        if not BULK_COPY:
            weight_at = weights + expert.to(tl.int64) * SIZE * K + (columns % SIZE)[None, :] * K + depth[:, None]
        for start in range(0, K, DEPTH):
            inside = depth < K - start
            if BULK_ROWS:
                of_rows = hidden.load([first, start])
            else:
                of_rows = _load_rows(hidden_at, is_row, inside, K % DEPTH == 0)
                hidden_at += DEPTH
            if BULK_COPY:
                weight = weights.load([expert * SIZE + first_column, start]).T
            else:
                if K % DEPTH == 0:
                    weight = tl.load(weight_at)
                else:
                    weight = tl.load(weight_at, mask=inside[:, None], other=0.0)
                weight_at += DEPTH
            out = tl.dot(of_rows, weight, out, input_precision="ieee")
        out *= tl.load(pair_weights_ptr + pairs, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    target = (pairs % num_columns).to(tl.int64) * num_tokens + pairs // num_columns
    out_at = out_ptr + target[:, None] * SIZE + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_row & (columns < SIZE)[None, :])
