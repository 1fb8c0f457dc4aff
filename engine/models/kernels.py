"""Which implementation of its building blocks a model uses: plain torch, or Triton with everything small fused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import ConfigError
from engine.layers.embedding import embed
from engine.layers.linear import Linear
from engine.layers.norm import HeadNorm, RmsNorm
from engine.layers.rotary import rotate_and_store
from engine.models.spec import ModelSpec
from engine.moe.layer import MoeLayer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The constructors and functions that have two implementations; the torch ones are the reference."""

    name: str
    norm: Callable[[Tensor, float], RmsNorm]  # its ``add`` takes what ``output_linear`` and the layers return
    linear: Callable[[Tensor, Tensor | None], Linear]
    output_linear: Callable[[Tensor, Tensor | None], Linear]
    moe_layer: Callable[..., MoeLayer]
    embed: Callable[..., tuple[Tensor, Tensor, Tensor]]
    rotate_and_store: Callable[..., Tensor]
    head_norm: Callable[..., HeadNorm]


TORCH = Kernels("torch", RmsNorm, Linear, Linear, MoeLayer, embed, rotate_and_store, HeadNorm)


def create_kernels(name: str, spec: ModelSpec, device: torch.device) -> Kernels:
    """The kernels called ``name`` (checked by EngineConfig); "auto" takes Triton on a GPU and logs why."""
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
        logger.info("kernels %s: the device is %s", name, device)
    if name == "torch":
        return TORCH
    if device.type != "cuda":
        raise ConfigError(f"kernels is 'triton', but the device is {device}; allowed there: auto, torch")
    from engine.layers import fused
    from engine.layers.fused_heads import FusedHeadNorm
    from engine.layers.fused_linear import FusedLinear, SplitLinear

    moe_layer: Callable[..., MoeLayer] = MoeLayer
    if spec.moe_layers:
        from engine.moe.fused import FusedMoeLayer
        from engine.moe.tiles import tile_table

        card = torch.cuda.get_device_name(device)
        tiles = tile_table(card, spec.num_experts, spec.hidden_size, spec.expert_size)
        moe_layer = partial(FusedMoeLayer, tiles=tiles, side=torch.cuda.Stream(device))
    return Kernels(
        "triton", fused.FusedRmsNorm, FusedLinear, SplitLinear, moe_layer, fused.embed, fused.rotate_and_store,
        FusedHeadNorm,
    )  # fmt: skip
