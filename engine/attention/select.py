"""Which attention backend runs, and why."""

from __future__ import annotations

import logging

from engine.attention.base import AttentionBackend
from engine.attention.sdpa import SdpaAttention

logger = logging.getLogger(__name__)


def create_attention(name: str) -> AttentionBackend:
    """The backend called ``name`` (checked by EngineConfig); "auto" takes the fastest one here and logs why."""
    backend = SdpaAttention()
    if name == "auto":
        logger.info("attention backend %s: runs on every device", backend.name)
    return backend
