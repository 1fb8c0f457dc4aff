"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): every layer sparse, with a gated shared expert.

Letters: see engine/types.py. Weight names are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.base import Attention
from engine.batch import ForwardBatch, ForwardOutput
from engine.config import ConfigError
from engine.kv_cache.storage import KvStorage
from engine.layers.linear import GatedMlp, Linear
from engine.layers.norm import RmsNorm
from engine.layers.rotary import RotaryEmbedding
from engine.models.kernels import Kernels
from engine.models.spec import ModelSpec
from engine.moe.dimmer import Dimmer
from engine.moe.experts import PackedExperts
from engine.moe.gate import Gate
from engine.moe.layer import MoeLayer
from engine.weights.manifest import Init, TensorSpec, WeightSource


def read_spec(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec. Raises ConfigError for what this implementation does not compute."""
    for key, wanted in (("hidden_act", "silu"), ("decoder_sparse_step", 1), ("use_sliding_window", False)):
        value = config.get(key, wanted)
        if value != wanted:
            raise ConfigError(f"config.json key {key} is {value!r}; allowed: {wanted!r}")
    if config.get("mlp_only_layers"):
        raise ConfigError(f"config.json key mlp_only_layers is {config['mlp_only_layers']}; allowed: []")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type", "default")  # "type" in configs before transformers 4.43
    if rope_type != "default":
        raise ConfigError(f"config.json key rope_type is {rope_type!r}; allowed: 'default'")
    return ModelSpec(
        architecture="Qwen2MoeForCausalLM",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        num_experts=config["num_experts"],
        num_experts_per_token=config["num_experts_per_tok"],
        expert_size=config["moe_intermediate_size"],
        shared_expert_size=config["shared_expert_intermediate_size"],
        norm_topk_prob=config.get("norm_topk_prob", False),
        qkv_bias=config.get("qkv_bias", True),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", 10_000.0)),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_position=config["max_position_embeddings"],
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
    )


@dataclass(slots=True)
class DecoderLayer:
    input_norm: RmsNorm
    qkv: Linear  # D -> q_size + 2 kv_size
    output: Linear  # q_size -> D
    post_attention_norm: RmsNorm
    moe: MoeLayer


@dataclass(frozen=True, slots=True)
class Hidden:
    """What flows from layer to layer. T rows."""

    residual: Tensor  # [T, D]
    normed: Tensor  # [T, D], the residual after the coming layer's norm
    cos: Tensor
    sin: Tensor
    dimmed_pairs: Tensor  # [T] int64, counted up in place


class Qwen2Moe:
    """The weights of one model on one device, and its forward pass. Holds no per-request state.

    Layers with a dimmer have room for ``num_united`` experts behind their originals.
    """

    def __init__(
        self,
        spec: ModelSpec,
        source: WeightSource,
        dimmers: list[Dimmer | None],
        num_united: int,
        attention: Attention,
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._attention = attention
        self._kernels = kernels
        self._source = source
        self._dtype, self._device = dtype, device
        self._rotary = RotaryEmbedding(spec.head_dim, spec.max_position, spec.rope_theta, device)
        vocab_shape = (spec.vocab_size, spec.hidden_size)
        self._embedding = self._load("model.embed_tokens.weight", vocab_shape)
        self.layers = [
            self._load_layer(index, dimmer, num_united if dimmer else 0) for index, dimmer in enumerate(dimmers)
        ]
        norm = self._load_norm("model.norm.weight")
        self._next_norms = [*(layer.input_norm for layer in self.layers[1:]), norm]
        self._lm_head = self._embedding if spec.tie_word_embeddings else self._load("lm_head.weight", vocab_shape)
        del self._source

    def forward(self, batch: ForwardBatch, kv: KvStorage) -> ForwardOutput:
        hidden, queries = self.begin(batch, kv)
        for index in range(len(self.layers)):
            attended = self.attend(index, queries, batch, kv)
            hidden, queries = self.advance(index, hidden, attended, batch, kv)
        return ForwardOutput(self.logits(hidden.normed[batch.sample_rows]), hidden.dimmed_pairs)

    # The parts of a forward pass. A step with prompts in it runs the ones between attentions as CUDA graphs.

    def begin(self, batch: ForwardBatch, kv: KvStorage) -> tuple[Hidden, Tensor]:
        """Embeds the tokens; returns the first layer's queries [T, num_heads, head_dim], its KV being stored."""
        x = self._embedding[batch.token_ids]
        cos, sin = self._rotary.tables(batch.positions)
        hidden = Hidden(x, self.layers[0].input_norm(x), cos, sin, torch.zeros_like(batch.positions))
        return hidden, self._queries(0, hidden, batch, kv)

    def attend(self, index: int, queries: Tensor, batch: ForwardBatch, kv: KvStorage) -> Tensor:
        """[T, num_heads, head_dim] -> [T, num_heads, head_dim]"""
        return self._attention.forward(queries, kv.keys[index], kv.values[index], batch.attention)

    def advance(
        self, index: int, hidden: Hidden, attended: Tensor, batch: ForwardBatch, kv: KvStorage
    ) -> tuple[Hidden, Tensor]:
        """The rest of layer ``index``; returns the next layer's queries, after the last layer an empty tensor."""
        layer = self.layers[index]
        x, normed = layer.post_attention_norm.add(hidden.residual, layer.output(attended.flatten(1)))
        x, normed = self._next_norms[index].add(x, layer.moe(normed, batch.rows, hidden.dimmed_pairs))
        hidden = replace(hidden, residual=x, normed=normed)
        if index + 1 == len(self.layers):
            return hidden, x[:0]
        return hidden, self._queries(index + 1, hidden, batch, kv)

    def logits(self, normed: Tensor) -> Tensor:
        """[N', D] -> [N', V]"""
        return F.linear(normed, self._lm_head)

    def _queries(self, index: int, hidden: Hidden, batch: ForwardBatch, kv: KvStorage) -> Tensor:
        qkv, slots = self.layers[index].qkv(hidden.normed), batch.attention.slot_mapping
        return self._kernels.rotate_and_store(qkv, hidden.cos, hidden.sin, self._spec.num_heads, slots, kv, index)

    # Loading

    def _load(self, name: str, shape: tuple[int, ...], init: Init = Init.NORMAL) -> Tensor:
        return self._source.get(TensorSpec(name, shape, init)).to(self._device, self._dtype)

    def _load_norm(self, name: str) -> RmsNorm:
        return self._kernels.norm(self._load(name, (self._spec.hidden_size,), Init.ONES), self._spec.rms_norm_eps)

    def _load_layer(self, index: int, dimmer: Dimmer | None, num_united: int) -> DecoderLayer:
        spec, prefix = self._spec, f"model.layers.{index}."
        attention = f"{prefix}self_attn."
        sizes = {"q_proj": spec.q_size, "k_proj": spec.kv_size, "v_proj": spec.kv_size}
        weights = [self._load(f"{attention}{p}.weight", (size, spec.hidden_size)) for p, size in sizes.items()]
        bias = None
        if spec.qkv_bias:
            bias = torch.cat([self._load(f"{attention}{p}.bias", (size,), Init.ZEROS) for p, size in sizes.items()])
        return DecoderLayer(
            input_norm=self._load_norm(f"{prefix}input_layernorm.weight"),
            qkv=Linear(torch.cat(weights), bias),
            output=Linear(self._load(f"{attention}o_proj.weight", (spec.hidden_size, spec.q_size))),
            post_attention_norm=self._load_norm(f"{prefix}post_attention_layernorm.weight"),
            moe=self._load_moe(index, f"{prefix}mlp.", dimmer, num_united),
        )

    def _load_moe(self, index: int, prefix: str, dimmer: Dimmer | None, num_united: int) -> MoeLayer:
        spec = self._spec
        shared = f"{prefix}shared_expert."
        shared_in, shared_out = (
            (spec.shared_expert_size, spec.hidden_size),
            (spec.hidden_size, spec.shared_expert_size),
        )
        return self._kernels.moe_layer(
            index=index,
            gate=Gate(
                self._load(f"{prefix}gate.weight", (spec.num_experts, spec.hidden_size)),
                spec.num_experts_per_token,
                spec.norm_topk_prob,
            ),
            experts=self._load_experts(f"{prefix}experts.", num_united),
            shared_expert=GatedMlp(
                torch.cat([self._load(f"{shared}{p}.weight", shared_in) for p in ("gate_proj", "up_proj")]),
                self._load(f"{shared}down_proj.weight", shared_out),
            ),
            shared_gate=self._load(f"{prefix}shared_expert_gate.weight", (1, spec.hidden_size)),
            dimmer=dimmer,
        )

    def _load_experts(self, prefix: str, num_united: int) -> PackedExperts:
        """Originals from the source, straight into the packed table; room for united experts behind them."""
        spec = self._spec
        size, hidden = spec.expert_size, spec.hidden_size
        num_packed = spec.num_experts + num_united
        gate_up = torch.empty(num_packed, 2 * size, hidden, dtype=self._dtype, device=self._device)
        down = torch.empty(num_packed, hidden, size, dtype=self._dtype, device=self._device)
        for expert in range(spec.num_experts):
            name = f"{prefix}{expert}."
            gate_up[expert, :size] = self._source.get(TensorSpec(f"{name}gate_proj.weight", (size, hidden)))
            gate_up[expert, size:] = self._source.get(TensorSpec(f"{name}up_proj.weight", (size, hidden)))
            down[expert] = self._source.get(TensorSpec(f"{name}down_proj.weight", (hidden, size)))
        gate_up[spec.num_experts :], down[spec.num_experts :] = 0, 0
        return PackedExperts(gate_up, down, spec.num_experts)
