"""What a model is: the facts of config.json that the engine needs, under the engine's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and constants of a decoder-only MoE transformer. Letters: see engine/types.py."""

    architecture: str
    num_layers: int  # L
    hidden_size: int  # D
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # V
    num_experts: int  # E
    num_experts_per_token: int  # A
    expert_size: int  # F
    shared_expert_size: int
    norm_topk_prob: bool
    qkv_bias: bool
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position: int
    dtype: str

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as a dict. Raises ConfigError with one sentence."""
    path = directory / "config.json"
    if not path.exists():
        raise ConfigError(f"model.path is '{directory}', which has no config.json; allowed: a Hugging Face directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return config
