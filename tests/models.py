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


_DENSE: dict[str, Any] = {key: value for key, value in TINY_CONFIG.items() if "expert" not in key} | {
    "tie_word_embeddings": True,
    "num_hidden_layers": 2,
}

# One tiny model of each family, each with the features that set it apart switched on.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
    "qwen2_moe, dense layers": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [3],
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "norm_topk_prob": True,
        "head_dim": 32,
        "num_experts": 16,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2": _DENSE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": _DENSE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "llama": _DENSE
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": _DENSE
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = TINY_CONFIG | overrides
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return write_config(directory, **overrides)
