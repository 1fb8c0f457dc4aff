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
