"""A trainable Qwen2-MoE in plain torch, whose weights leave it under Hugging Face's names.

Legend: B sequences of T tokens, N = B T, E experts, A experts per token, D hidden size, F expert FFN width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.training.expert_compute import EXPERT_COMPUTE
from benchmarks.training.fp8 import QUANTIZATION_CONFIG, is_quantised, quantise_checkpoint, round_to_fp8_
from engine.layers.rotary import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class MoeConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    expert_size: int
    shared_size: int
    num_experts: int = 60
    num_experts_per_token: int = 4
    head_dim: int = 64
    norm_topk_prob: bool = True
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position: int = 2048
    end_token_id: int = 0
    fp8: bool = False  # how the matrices are stored

    def to_hugging_face(self) -> dict[str, Any]:
        """config.json of transformers' Qwen2MoeForCausalLM."""
        stored_as = {"quantization_config": QUANTIZATION_CONFIG} if self.fp8 else {}
        return stored_as | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "attention_dropout": 0.0,
            "bos_token_id": self.end_token_id,
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "eos_token_id": self.end_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.shared_size,
            "max_position_embeddings": self.max_position,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.expert_size,
            "norm_topk_prob": self.norm_topk_prob,
            "num_attention_heads": self.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "qkv_bias": False,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "shared_expert_intermediate_size": self.shared_size,
            "tie_word_embeddings": True,
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


def rotary_tables(config: MoeConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_position, head_dim]"""
    rotary = RotaryEmbedding(config.head_dim, config.max_position, config.rope_theta, torch.device("cpu"))
    return rotary.tables(torch.arange(config.max_position))


class Attention(nn.Module):
    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, sum(self.sizes) * config.head_dim, bias=False)
        self.output = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, D]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(self.sizes, dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, H, T, head_dim]
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class MoeBlock(nn.Module):
    """Top-k experts beside a shared expert behind a sigmoid gate."""

    def __init__(self, config: MoeConfig, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        hidden, size, shared = config.hidden_size, config.expert_size, config.shared_size
        self.num_chosen, self.norm_topk_prob = config.num_experts_per_token, config.norm_topk_prob
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * size, hidden))
        self.down = nn.Parameter(torch.empty(config.num_experts, hidden, size))
        self.shared_gate_up = nn.Linear(hidden, 2 * shared, bias=False)
        self.shared_down = nn.Linear(shared, hidden, bias=False)
        self.shared_gate = nn.Linear(hidden, 1, bias=False)
        self.compute = compute
        self.router_noise = 0.0  # of the logits, while training: lets experts that start alike be told apart

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> [N, D] and the load-balancing loss (Switch Transformer, arXiv 2101.03961; 1 when even)."""
        router_logits = F.linear(x.float(), self.gate.weight.float())  # [N, E]
        if self.training and self.router_noise:
            router_logits = router_logits + self.router_noise * torch.randn_like(router_logits)
        probs = router_logits.softmax(dim=-1)
        weights, ids = probs.topk(self.num_chosen, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        chosen = torch.zeros_like(probs).scatter_(1, ids, 1.0)
        balance = probs.shape[1] * (chosen.mean(dim=0) / self.num_chosen * probs.mean(dim=0)).sum()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        gate, up = self.shared_gate_up(x).chunk(2, dim=-1)
        shared = torch.sigmoid(self.shared_gate(x)) * self.shared_down(F.silu(gate) * up)
        return self.compute(x, ids, weights.to(x.dtype), self.gate_up, self.down) + shared, balance


class Layer(nn.Module):
    def __init__(self, config: MoeConfig, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.moe = MoeBlock(config, compute)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.input_norm(x), cos, sin)
        output, balance = self.moe(self.moe_norm(x).flatten(0, 1))
        return x + output.view_as(x), balance


class MoeLm(nn.Module):
    """``expert_compute``: a key of EXPERT_COMPUTE; all give the same numbers but for rounding."""

    def __init__(self, config: MoeConfig, expert_compute: str = "loop") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, EXPERT_COMPUTE[expert_compute]) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, seed: int) -> None:
        """Normal weights; what writes into the residual stream is scaled down by depth, as in GPT-2."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = 0.02 if "embedding" in name else parameter.shape[-1] ** -0.5
            if "down" in name or "output" in name:
                std /= (2 * self.config.num_layers) ** 0.5
            nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> logits [B, T, V] and the mean load-balancing loss."""
        hidden, balance = self.hidden(tokens)
        return F.linear(hidden, self.embedding.weight), balance

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] -> [B, T, D] before the output projection, and the mean load-balancing loss."""
        x = self.embedding(tokens)
        num_tokens = tokens.shape[1]
        cos, sin = self.cos[:num_tokens], self.sin[:num_tokens]
        balances = []
        for layer in self.layers:
            x, balance = layer(x, cos, sin)
            balances.append(balance)
        return self.norm(x), torch.stack(balances).mean()

    def named_weights(self) -> dict[str, Tensor]:
        """Views of the parameters under Hugging Face's names."""
        config = self.config
        tensors = {"model.embed_tokens.weight": self.embedding.weight, "model.norm.weight": self.norm.weight}
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            tensors[f"{prefix}input_layernorm.weight"] = layer.input_norm.weight
            tensors[f"{prefix}post_attention_layernorm.weight"] = layer.moe_norm.weight
            sizes = [size * config.head_dim for size in layer.attention.sizes]
            for name, part in zip("qkv", layer.attention.qkv.weight.split(sizes), strict=True):
                tensors[f"{prefix}self_attn.{name}_proj.weight"] = part
            tensors[f"{prefix}self_attn.o_proj.weight"] = layer.attention.output.weight
            moe, prefix = layer.moe, f"{prefix}mlp."
            tensors[f"{prefix}gate.weight"] = moe.gate.weight
            tensors[f"{prefix}shared_expert_gate.weight"] = moe.shared_gate.weight
            tensors |= _mlp(f"{prefix}shared_expert.", moe.shared_gate_up.weight, moe.shared_down.weight)
            for expert in range(config.num_experts):
                tensors |= _mlp(f"{prefix}experts.{expert}.", moe.gate_up[expert], moe.down[expert])
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def checkpoint(self) -> dict[str, Tensor]:
        """Weights under Hugging Face's names, bfloat16, on the CPU."""
        return {n: t.to("cpu", torch.bfloat16, copy=True).contiguous() for n, t in self.named_weights().items()}

    @torch.no_grad()
    def round_to_stored_(self) -> None:
        """Makes the weights what a reader of the stored ones will have."""
        for name, tensor in self.named_weights().items():
            if self.config.fp8 and is_quantised(name):
                round_to_fp8_(tensor)

    def save(self, directory: Path) -> None:
        """Writes model.safetensors and config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = self.checkpoint()
        if self.config.fp8:
            tensors = quantise_checkpoint(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.config.to_hugging_face(), indent=2) + "\n")


def _mlp(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2)
    return {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}
