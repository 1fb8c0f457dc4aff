"""Dense projections of few rows in Triton, where latency decides and a general library's launches cannot overlap.

Letters: T tokens, K inputs, N outputs, S splits of K. Twin of engine.layers.linear. The gated activation, the bias and
the row scale cost no launch; with splits each program's chain of products is short, and whoever reads the S partial
results adds them up on the way. Larger steps, where the arithmetic decides, take the library's product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from engine.layers.launch import launch_options, let_next_start, prefetch, wait_for_inputs
from engine.layers.linear import Linear

MAX_ROWS = 128
MIN_ROWS = 16  # the matrix unit's
PREFETCHED_BYTES = 512  # of each row of weights, read before the inputs are there; more would delay what runs then
SHARED_BYTES = 100 * 1024  # of one program; two of them fit an H100's core, one an A100's


@dataclass(slots=True)
class FusedLinear(Linear):
    """Linear whose small steps run here."""

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if len(x) > MAX_ROWS:
            return F.linear(x, self.weight, self.bias)
        out = x.new_empty(1, len(x), len(self.weight))
        launch_linear(x, self.weight, out, bias=self.bias)
        return out[0]


@dataclass(slots=True)
class SplitLinear(Linear):
    """FusedLinear whose small steps leave addends [S, T, N] in float32, for a norm to sum up."""

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > MAX_ROWS:
            return F.linear(x, self.weight, self.bias)
        out = x.new_empty(num_splits(len(x)), len(x), len(self.weight), dtype=torch.float32)
        launch_linear(x, self.weight, out, bias=self.bias)
        return out


def num_splits(num_rows: int) -> int:
    """S of the products whose parts a norm adds up: the more rows, the more its reading weighs."""
    return 4 if num_rows <= 32 else 2


def launch_linear(
    x: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None = None, row_logits: Tensor | None = None,
    gated: bool = False,
) -> None:  # fmt: skip
    """out.sum(0) = (x @ weight.T + bias) * sigmoid(row_logits) by row.  [T, K], [N, K], [N], [T] -> [S, T, N]

    ``gated``, with one split: ``weight`` is [2 N, K], gate before up; out[0] = silu(x @ gate.T) * (x @ up.T).
    T is at most MAX_ROWS.
    """
    num_rows, num_inputs = x.shape
    splits, _, num_columns = out.shape
    rows = max(MIN_ROWS, triton.next_power_of_2(num_rows))
    warps, depth_bytes = (4, 256) if rows <= 64 else (8, 128)  # of a row of weights per step of the inner loop
    depth = depth_bytes // x.element_size()
    columns = tile_columns(num_columns, splits, x.device)
    stage_bytes = (rows + (2 if gated else 1) * columns) * depth_bytes
    stages = max(3, min(6, SHARED_BYTES // stage_bytes + 1))
    split = triton.cdiv(triton.cdiv(num_inputs, depth), splits) * depth
    even = splits * split == num_inputs
    # A gated product runs on the other stream, where nothing starts before its inputs are there.
    prefetched = min(PREFETCHED_BYTES, split * x.element_size()) if even and not gated else 0
    _linear_kernel[(triton.cdiv(num_columns, columns), splits)](
        x, weight, bias, row_logits, out, num_rows, num_columns,
        K=num_inputs, SPLIT=split, EVEN=even, GATED=gated, PREFETCHED=prefetched,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=warps, num_stages=stages,
        **launch_options(x.device),
    )  # fmt: skip


def tile_columns(num_columns: int, splits: int, device: torch.device) -> int:
    """Columns per program: as many, up to 64, as leave two cores of three a program."""
    num_cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128
    columns = 64
    while columns > 16 and 3 * triton.cdiv(num_columns, columns) * splits < 2 * num_cores:
        columns //= 2
    return columns


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, row_logits_ptr, out_ptr, num_rows, num_columns,
    K: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, GATED: tl.constexpr, PREFETCHED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    in_step = rows < num_rows
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    depth = split * SPLIT + tl.arange(0, DEPTH)
    x_at = x_ptr + rows[:, None] * K + depth[None, :]
    weight_rows = weight_ptr + tl.minimum(columns, num_columns - 1).to(tl.int64) * K
    weight_at = weight_rows[None, :] + depth[:, None]
    up_at = weight_at + num_columns.to(tl.int64) * K
    out = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    up = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if PREFETCHED > 0:
        prefetch(weight_rows + split * SPLIT, PREFETCHED, DEPENDENT)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    for start in range(0, SPLIT, DEPTH):
        if EVEN:
            x = tl.load(x_at + start, mask=in_step[:, None], other=0.0)
            weight = tl.load(weight_at + start)
        else:
            inside = depth < K - start
            x = tl.load(x_at + start, mask=in_step[:, None] & inside[None, :], other=0.0)
            weight = tl.load(weight_at + start, mask=inside[:, None], other=0.0)
        out = tl.dot(x, weight, out, input_precision="ieee")
        if GATED:
            if EVEN:
                up_weight = tl.load(up_at + start)
            else:
                up_weight = tl.load(up_at + start, mask=inside[:, None], other=0.0)
            up = tl.dot(x, up_weight, up, input_precision="ieee")
    if GATED:
        out = out * tl.sigmoid(out) * up
    if bias_ptr is not None and split == 0:
        out += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    if row_logits_ptr is not None:
        out *= tl.sigmoid(tl.load(row_logits_ptr + rows, mask=in_step, other=0.0))[:, None]
    out_at = out_ptr + (split * num_rows + rows[:, None]) * num_columns + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=in_step[:, None] & (columns < num_columns)[None, :])
