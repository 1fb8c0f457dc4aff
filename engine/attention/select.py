"""Which attention backends run, and why."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from engine.attention.base import Attention
from engine.attention.flash_attn import PAGE_MULTIPLE as FLASH_ATTN_PAGE
from engine.attention.flash_attn import FlashAttention
from engine.attention.flash_attn3 import FlashAttention3
from engine.attention.sdpa import SdpaAttention
from engine.attention.xformers import PAGE_MULTIPLE as XFORMERS_PAGE
from engine.attention.xformers import XformersDecode
from engine.config import ConfigError

logger = logging.getLogger(__name__)


def create_attention(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> Attention:
    """The backends called ``name`` (checked by EngineConfig); "auto" takes the fastest here and logs why.

    Raises ConfigError when the named backend cannot run here.
    """
    if name == "auto":
        return _choose(device, head_dim, dtype, block_size)
    obstacle = _obstacle(name, device, head_dim, dtype, block_size)
    if obstacle:
        raise ConfigError(f"attention is {name!r}, but {obstacle}; allowed here: auto, sdpa")
    sdpa = SdpaAttention()
    if name == "sdpa":
        return Attention(sdpa, sdpa)
    if name == "xformers":
        return Attention(XformersDecode(), sdpa)
    backend = FlashAttention3() if name == "flash_attn3" else FlashAttention()
    return Attention(backend, backend)


def _choose(device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> Attention:
    sdpa = SdpaAttention()
    if device.type != "cuda":
        logger.info("attention sdpa: runs on every device")
        return Attention(sdpa, sdpa)
    from engine.attention.paged_decode import PagedDecodeAttention

    decode = PagedDecodeAttention(device)
    for name, backend in (("flash_attn3", FlashAttention3()), ("flash_attn", FlashAttention())):
        obstacle = _obstacle(name, device, head_dim, dtype, block_size)
        if obstacle is None:
            logger.info("attention: %s for decode, %s for prefill, the fastest here", decode.name, name)
            return Attention(decode, backend)
        logger.info("attention: not %s, %s", name, obstacle)
    logger.info("attention: %s for decode, sdpa for prefill", decode.name)
    return Attention(decode, sdpa)


def _obstacle(name: str, device: torch.device, head_dim: int, dtype: torch.dtype, block_size: int) -> str | None:
    """Why the backend cannot run; None if it can."""
    if name == "sdpa":
        return None
    module, page_multiple, head_dims = {
        "flash_attn3": ("flash_attn_interface", 1, (64, 96, 128, 192, 256)),
        "flash_attn": ("flash_attn", FLASH_ATTN_PAGE, (128,)),
        "xformers": ("xformers", XFORMERS_PAGE, (32, 64, 128, 256)),
    }[name]
    if device.type != "cuda":
        return f"the device is {device}"
    if find_spec(module) is None:
        return f"the package {module} is not installed"
    if name == "flash_attn3" and torch.cuda.get_device_capability(device)[0] != 9:
        return "the card is not a Hopper"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the model is in {dtype}"
    if head_dim not in head_dims:
        return f"heads have {head_dim} dimensions"
    if block_size % page_multiple:
        return f"cache.block_size {block_size} is not a multiple of {page_multiple}"
    return None
