"""Where a GPU step's time goes, kernel by kernel, beside the least time that reading weights and KV takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from engine.batch import StepRows, to_device
from engine.layers.fused_linear import MAX_ROWS
from engine.moe import fused
from engine.moe.align import Alignment, align
from engine.pool.slots import ModelSlot
from engine.types import Levels

LIBRARY_PRODUCT = "library product"
LIBRARY_NAMES = ("nvjet", "gemm", "cutlass_80", "splitKreduce")

Row = dict[str, float | str]


def profile(run: Callable[[], object], repeats: int, floors_us: Mapping[str, float] | None = None) -> list[Row]:
    """Kernels of one run, slowest first; their ``us`` add up to the whole run, gaps and all.

    Kernels of two streams overlap, and one may start while the one before it ends: a launch is charged with the time
    from the latest end before its own. ``floors_us`` maps kernels to the least they could take.
    """
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.end, event.time_range.start, _kernel(event.name))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    us: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    latest_end = min(start for _, start, _ in spans)
    for end, _, kernel in spans:
        us[kernel] += (end - latest_end) / repeats
        launches[kernel] += 1 / repeats
        latest_end = end
    rows: list[Row] = []
    for kernel in sorted(us, key=us.__getitem__, reverse=True):
        row: Row = {"kernel": kernel, "launches": round(launches[kernel], 1), "us": round(us[kernel], 1)}
        if floors_us and kernel in floors_us:
            row |= {"floor_us": round(floors_us[kernel], 1), "floor_frac": round(floors_us[kernel] / us[kernel], 3)}
        rows.append(row)
    return rows


def _kernel(name: str) -> str:
    return LIBRARY_PRODUCT if any(part in name for part in LIBRARY_NAMES) else name[:80]


def decode_floors_us(
    slot: ModelSlot, rows: StepRows, num_active_experts: int, bytes_s: float
) -> dict[str, float]:  # fmt: skip
    """Kernel |-> microseconds that reading its weights or KV takes in one decode step.

    ``num_active_experts`` is the sum over layers, ``bytes_s`` the card's speed.
    """
    model, spec = slot.model, slot.spec
    num_rows = len(rows.places)
    gate_up, down = (_bytes(getattr(model.layers[0].moe.experts, name)[0]) for name in ("gate_up", "down"))
    dense = sum(_bytes(layer.qkv.weight) + _bytes(layer.output.weight) for layer in model.layers)
    for layer in model.layers:
        if (shared := layer.moe.shared_expert) is not None:
            dense += _bytes(shared.gate_up) + _bytes(shared.down)
    num_bytes = {
        "_gate_up_kernel": gate_up * num_active_experts,
        "_down_kernel": down * num_active_experts,
        "_paged_decode_kernel": int(rows.ends.sum()) * spec.num_layers * 2 * spec.kv_size * slot.kv.keys.element_size(),
        "_linear_kernel": dense if num_rows <= MAX_ROWS else 0,
        LIBRARY_PRODUCT: spec.vocab_size * spec.hidden_size * slot.kv.keys.element_size()
        + (0 if num_rows <= MAX_ROWS else dense),
    }
    return {kernel: count / bytes_s * 1e6 for kernel, count in num_bytes.items() if count}


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


@torch.inference_mode()
def active_experts(slot: ModelSlot, rows: StepRows, setting: int) -> list[int]:
    """Of each layer, the experts that a decode step reads; the step runs once, without a graph."""
    counts: list[int] = []

    def count_and_align(ids: Tensor, num_packed: int, *others: Any) -> Alignment:
        counts.append(int((ids.unique() < num_packed).sum()))
        return align(ids, num_packed, *others)

    with patch.object(fused, "align", count_and_align):
        slot.model.forward(to_device(rows, slot.kv.block_size, Levels(decode=setting), slot.device), slot.kv)
    return counts


def copy_bytes_s(num_bytes: int = 4 << 30, repeats: int = 5) -> float:
    """Bytes per second of the card's own copy, read and written ones counted."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 2 * num_bytes * repeats / (start.elapsed_time(end) / 1e3)
