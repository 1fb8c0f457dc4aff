"""Small models for tests: real Hugging Face directories, written once per session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = PROJECT_ROOT / "deploy" / "models" / "demo-random"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

# 3 layers, 12 experts of which 4 are chosen; large enough weights that no two logits are nearly equal.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "qkv_bias": True,
    "dtype": "float32",
}


def write_config(directory: Path, **overrides: Any) -> Path:
    """A tiny model's directory without weights: config and the demo model's tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO_MODEL / name, directory / name)
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG | overrides))
    return directory


def write_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """A tiny model's directory as transformers writes it, weights included."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = TINY_CONFIG | overrides
    torch.manual_seed(seed)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return write_config(directory, **overrides)
