"""Block-scaled fp8 weights (DeepSeek-V3, arXiv 2412.19437, section 3.3; Qwen's -FP8 checkpoints): read, then widened.

A matrix [R, C] is stored as e4m3 codes, and beside it, under its name and SCALE_SUFFIX, one float32 for each block of
rows and columns: weight = code * scale. The engine computes in its own dtype, so the codes are multiplied out once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.weights.manifest import TensorSpec

CODE_NAME = "F8_E4M3"  # in a safetensors header
CODE_DTYPE = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"

Block = tuple[int, int]  # rows, columns


def scale_spec(spec: TensorSpec, block: Block) -> TensorSpec:
    """The tensor of scales that belongs to a matrix."""
    shape = tuple(-(-size // step) for size, step in zip(spec.shape, block, strict=True))
    return TensorSpec(spec.name + SCALE_SUFFIX, shape)


def expand_scales(scales: Tensor, block: Block, shape: tuple[int, int]) -> Tensor:
    """[R / block rows, C / block columns] -> [R, C]"""
    rows = scales.repeat_interleave(block[0], dim=0)[: shape[0]]
    return rows.repeat_interleave(block[1], dim=1)[:, : shape[1]]
