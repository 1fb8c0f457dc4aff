"""Triton twin of the gate: router product, softmax, top-k, and for the dimmer how the experts are used.

Legend: T tokens, E original experts, A experts per token, N packed experts, D hidden size. Sums run in integers or in a
fixed order, so the same inputs give the same routing. Latency counts here: two launches, each short (see
engine.moe.align).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.batch import RowInfo
from engine.layers.launch import launch_options, let_next_start, wait_for_inputs
from engine.moe.dimmer import Dimmer
from engine.moe.dimmer_kernels import count_use
from engine.moe.gate import Routing

SMALL_STEP_TOKENS = 256  # up to here latency counts, beyond throughput
MIN_CHUNK_ROWS = 16  # the matrix unit's
LARGE_CHUNK_ROWS = 64
DEPTH = 128
NUM_SPLITS = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """What the gates say, before dimming."""

    routing: Routing  # with a dimmer, and while a level is above 0, with probs [T, >= E]
    shared_logits: Tensor  # [T] float32, the shared expert's gate
    use: Tensor | None  # [4, >= E] int64, see engine.moe.dimmer_kernels.count_use


def choose(
    x: Tensor, router: Tensor, num_experts: int, num_columns: int, normalise: bool, num_packed: int, rows: RowInfo,
    dimmer: Dimmer | None, layer: int,
) -> Choice:  # fmt: skip
    """Top ``num_columns`` of softmax(x @ router[:E].T), and x @ router[E], 0 without that row.  [T, D], [>= E, D]

    ``router`` has a power of two of rows. Rows that only pad the batch get no expert. With a ``dimmer``, and while a
    level is above 0, the experts' use is counted too.
    """
    num_tokens, hidden_size = x.shape
    options = launch_options(x.device)
    is_small, block_e = num_tokens <= SMALL_STEP_TOKENS, len(router)
    chunk_rows, num_splits = (MIN_CHUNK_ROWS, NUM_SPLITS) if is_small else (LARGE_CHUNK_ROWS, 1)
    ids = torch.empty(num_tokens, num_columns, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, num_columns, dtype=torch.float32, device=x.device)
    shared_logits = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    partial_logits = torch.empty(num_splits, num_tokens, block_e, dtype=torch.float32, device=x.device)
    use = probs = None
    tables: tuple[Tensor | int | None, ...] = (None, 0, layer, None, None)
    if dimmer is not None:
        use = torch.empty(4, block_e, dtype=torch.int64, device=x.device)
        probs = torch.empty(num_tokens, block_e, dtype=torch.float32, device=x.device)
        tables = (dimmer.top_k, dimmer.top_k.shape[1], layer, dimmer.keep, dimmer.protected[layer])
    _router_kernel[(triton.cdiv(num_tokens, chunk_rows), num_splits)](
        x, router, partial_logits, use, num_tokens,
        D=hidden_size, SPLIT=triton.cdiv(hidden_size, num_splits), DEPTH=DEPTH, ROWS=chunk_rows, BLOCK_E=block_e,
        num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    _choose_kernel[(num_tokens,)](
        partial_logits, rows.valid, rows.phase, rows.exact, rows.levels, ids, weights, shared_logits, probs, use,
        *tables, num_tokens, num_experts, num_packed,
        A=num_columns, BLOCK_A=triton.next_power_of_2(num_columns), NORMALISE=normalise, SPLITS=num_splits,
        BLOCK_E=block_e, CUTS=dimmer is not None and dimmer.cuts, KEEPS=dimmer is not None and dimmer.keeps,
        num_warps=1, **options,
    )  # fmt: skip
    return Choice(Routing(ids, weights, probs), shared_logits, use)


@triton.jit(do_not_specialize=["num_tokens"])
def _router_kernel(
    x_ptr, router_ptr, partial_ptr, use_ptr, num_tokens,
    D: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x @ router.T over one part of D; parts spread the router's bytes over the card. Zeroes ``use``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * SPLIT
    experts = tl.arange(0, BLOCK_E)
    depth = first + tl.arange(0, DEPTH)
    end = tl.minimum(first + SPLIT, D)
    x_at = x_ptr + tl.where(rows < num_tokens, rows, 0).to(tl.int64)[:, None] * D
    logits = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    if use_ptr is not None and tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(use_ptr + tl.arange(0, 4 * BLOCK_E), tl.zeros([4 * BLOCK_E], dtype=tl.int64))
    for start in range(0, SPLIT, DEPTH):
        inside = start + depth < end
        x = tl.load(x_at + start + depth[None, :], mask=inside[None, :], other=0.0)
        router = tl.load(router_ptr + experts[None, :] * D + start + depth[:, None], mask=inside[:, None], other=0.0)
        logits = tl.dot(x, router, logits, input_precision="ieee")
    target = (tl.program_id(1) * num_tokens + rows).to(tl.int64)
    tl.store(partial_ptr + target[:, None] * BLOCK_E + experts[None, :], logits, mask=(rows < num_tokens)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "layer"])
def _choose_kernel(
    partial_ptr, valid_ptr, phase_ptr, exact_ptr, levels_ptr, ids_ptr, weights_ptr, shared_ptr, probs_ptr, use_ptr,
    top_k_ptr, num_layers, layer, keep_ptr, protected_ptr, num_tokens, num_experts, no_expert,
    A: tl.constexpr, BLOCK_A: tl.constexpr, NORMALISE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr, CUTS: tl.constexpr, KEEPS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: a single warp, whose reductions need no shared memory."""
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_A)
    splits = tl.arange(0, SPLITS)
    valid = tl.load(valid_ptr + row) != 0
    if use_ptr is not None:
        counts = valid & (tl.load(levels_ptr) + tl.load(levels_ptr + 1) > 0)
        setting = tl.load(levels_ptr + tl.load(phase_ptr + row))
        may_dim = (tl.load(exact_ptr + row) == 0) & (setting > 0)
        top_k = tl.load(top_k_ptr + setting * num_layers + layer)
        keep = tl.load(keep_ptr + setting)
    wait_for_inputs(DEPENDENT)
    let_next_start(DEPENDENT)
    partial = tl.load(partial_ptr + (splits[:, None] * num_tokens + row) * BLOCK_E + experts[None, :])
    logits = tl.sum(partial, axis=0)
    tl.store(shared_ptr + row, tl.sum(tl.where(experts == num_experts, logits, 0.0), axis=0))
    logits = tl.where(experts < num_experts, logits, float("-inf"))
    exps = tl.exp(logits - tl.max(logits, axis=0))
    probs = exps / tl.sum(exps, axis=0)
    remaining = tl.where(experts < num_experts, probs, -1.0)
    ids = tl.full([BLOCK_A], 0, dtype=tl.int32) + no_expert
    weights = tl.zeros([BLOCK_A], dtype=tl.float32)
    for column in range(A):
        best, expert = tl.max(remaining, axis=0, return_indices=True)
        remaining = tl.where(experts == expert, -1.0, remaining)
        ids = tl.where((columns == column) & valid, expert, ids)
        weights = tl.where((columns == column) & valid, best, weights)
    if NORMALISE:
        weights = weights / tl.where(valid, tl.sum(weights, axis=0), 1.0)
    tl.store(ids_ptr + row * A + columns, ids, mask=columns < A)
    tl.store(weights_ptr + row * A + columns, weights, mask=columns < A)
    if use_ptr is not None:  # noqa: SIM102 (decided when compiling)
        if counts:
            tl.store(probs_ptr + row * BLOCK_E + experts, probs)
            count_use(
                ids, weights, may_dim, top_k, keep, protected_ptr, use_ptr, BLOCK_E, num_experts,
                A, BLOCK_A, CUTS, KEEPS,
            )  # fmt: skip
