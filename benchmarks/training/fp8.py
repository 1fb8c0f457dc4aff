"""Writes matrices as block-scaled fp8, the format that engine/weights/fp8.py reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.weights.fp8 import CODE_DTYPE, SCALE_SUFFIX, Block, expand_scales

BLOCK: Block = (128, 128)
UNQUANTISED = ("embed_tokens", "norm", "gate", "shared_expert_gate")  # what Qwen's checkpoints leave in bfloat16
QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.embed_tokens", "mlp.gate", "mlp.shared_expert_gate"],
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}


def is_quantised(name: str) -> bool:
    """Whether the tensor of this checkpoint name is stored as fp8."""
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    return module not in UNQUANTISED and not module.endswith("layernorm")


def quantise(matrix: Tensor, block: Block = BLOCK) -> tuple[Tensor, Tensor]:
    """[R, C] -> codes [R, C] and float32 scales; each block's largest number becomes the largest code."""
    rows, columns = matrix.shape
    wide = matrix.float()
    padded = torch.nn.functional.pad(wide, (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))  # [R / r, r, C / c, c]
    scales = (blocks.abs().amax(dim=(1, 3)) / torch.finfo(CODE_DTYPE).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / expand_scales(scales, block, (rows, columns))).to(CODE_DTYPE), scales


def round_to_fp8_(matrix: Tensor) -> None:
    """What is left of a matrix when it is stored as fp8 and read again."""
    codes, scales = quantise(matrix)
    matrix.copy_(codes.to(matrix.dtype) * expand_scales(scales, BLOCK, (matrix.shape[0], matrix.shape[1])))


def quantise_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by name, matrices as codes and scales."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_quantised(name):
            stored[name], stored[name + SCALE_SUFFIX] = quantise(tensor)
        else:
            stored[name] = tensor
    return stored
