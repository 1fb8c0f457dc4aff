"""What a model is: the facts of config.json that the engine needs, under the engine's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ConfigError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Stretches rotary embedding to longer contexts. ``kind`` "linear": all frequencies divided by ``factor``.

    "llama3" (Llama 3.1): low frequencies only, those whose wavelength exceeds
    original_max_position / low_freq_factor; a ramp up to original_max_position / high_freq_factor.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0  # tokens


@dataclass(frozen=True, slots=True)
class MoeNames:
    """What a family calls the parts of a MoE block in its checkpoints."""

    block: str = "mlp"
    gate: str = "gate_proj"  # of one expert
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and constants of a decoder-only transformer. Letters: see engine/types.py.

    Each layer is either dense or has routed experts; a model without routed experts has none of E, A, F.
    """

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
    shared_expert_size: int  # 0: no shared expert
    norm_topk_prob: bool
    qkv_bias: bool
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position: int
    dtype: str
    output_bias: bool = False  # of the projection after attention
    qk_norm: bool = False  # each query and key head is normalised before rotation
    rope_scaling: RopeScaling | None = None
    dense_size: int = 0  # FFN width of dense layers
    dense_layers: tuple[int, ...] = ()  # layers without routed experts
    moe_names: MoeNames = MoeNames()
    fp8_block: tuple[int, int] | None = None  # rows, columns that share a scale, if matrices are stored as fp8

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with routed experts, ascending; empty for a dense model."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.dense_layers)

    @property
    def pairs_per_token(self) -> int:
        """(token, expert) pairs that one token is routed to, over all layers."""
        return len(self.moe_layers) * self.num_experts_per_token


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
