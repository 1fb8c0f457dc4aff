"""Programmatic dependent launch: on Hopper and later a kernel may start while the one before it still runs.

Every Triton kernel here takes part: it waits for its inputs before it reads what an earlier kernel of the step wrote
and before it writes anything, and then lets the next one start, which so has its launch, its first instructions and
its reads of weights and step inputs behind it when this one ends. A kernel that waited has all earlier ones behind it,
because each of those ended only after its own wait. Letting the next one start any earlier would give its programs the
places of kernels on the other stream. Elsewhere all this compiles to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = 9  # Hopper's


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch on ``device``: the kernel's DEPENDENT, and the launch attribute where it exists."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= FIRST_CAPABILITY:
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Once all programs have called this or ended, the next kernel's take the places that are free or become so."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, num_bytes, DEPENDENT: tl.constexpr):
    """Before the wait: start reading ``num_bytes``, a multiple of 16, at each of ``pointers`` into L2.

    For weights: while the kernel before this one ends, the card's memory is idle.
    """
    if DEPENDENT:
        addresses = pointers.to(tl.int64)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
            [addresses, tl.zeros_like(addresses).to(tl.int32) + num_bytes],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
