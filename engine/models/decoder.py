"""The one decoder that every family runs on: attention and feed-forward as the spec describes them.

Letters: see engine/types.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.attention.base import Attention
from engine.batch import ForwardBatch, ForwardOutput, RowInfo
from engine.kv_cache.storage import KvStorage
from engine.layers.linear import GatedMlp, Linear
from engine.layers.norm import HeadNorm, RmsNorm
from engine.layers.rotary import RotaryEmbedding
from engine.models.kernels import Kernels
from engine.models.spec import ModelSpec
from engine.moe.dimmer import Dimmer
from engine.moe.experts import PackedExperts
from engine.moe.gate import Gate
from engine.moe.layer import MoeLayer


@dataclass(slots=True)
class DenseLayer:
    """A feed-forward without routed experts: nothing to dim."""

    mlp: GatedMlp

    def __call__(self, x: Tensor, rows: RowInfo, dimmed_pairs: Tensor) -> Tensor:
        return self.mlp(x)


@dataclass(slots=True)
class DecoderLayer:
    """One layer's parts in the order of their use; maps of widths as in -> out."""

    input_norm: RmsNorm
    qkv: Linear  # D -> q_size + 2 kv_size
    head_norm: HeadNorm | None
    output: Linear  # q_size -> D
    post_attention_norm: RmsNorm
    feed_forward: MoeLayer | DenseLayer

    @property
    def moe(self) -> MoeLayer:
        """The feed-forward of a layer with routed experts."""
        if not isinstance(self.feed_forward, MoeLayer):
            raise TypeError("a dense layer has no routed experts")
        return self.feed_forward


@dataclass(frozen=True, slots=True)
class Hidden:
    """What flows from layer to layer. T rows."""

    residual: Tensor  # [T, D]
    normed: Tensor  # [T, D], the residual after the coming layer's norm
    cos: Tensor
    sin: Tensor
    dimmed_pairs: Tensor  # [T] int64, counted up in place


class Decoder:
    """The weights of one model on one device, and its forward pass. Holds no per-request state.

    ``weights`` has a tensor for every key of engine.models.layout.model_parameters.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        dimmers: list[Dimmer | None],
        attention: Attention,
        kernels: Kernels,
    ) -> None:
        self._spec = spec
        self._attention = attention
        self._kernels = kernels
        self._embedding = weights["embedding"]
        self._rotary = RotaryEmbedding(
            spec.head_dim, spec.max_position, spec.rope_theta, self._embedding.device, spec.rope_scaling
        )
        self.layers = [self._layer(index, weights, dimmers[index]) for index in range(spec.num_layers)]
        norm = kernels.norm(weights["norm"], spec.rms_norm_eps)
        self._next_norms = [*(layer.input_norm for layer in self.layers[1:]), norm]
        self._lm_head = self._embedding if spec.tie_word_embeddings else weights["lm_head"]

    @property
    def experts(self) -> dict[int, PackedExperts]:
        """The packed tables of the layers that have routed experts."""
        return {index: self.layers[index].moe.experts for index in self._spec.moe_layers}

    def forward(self, batch: ForwardBatch, kv: KvStorage) -> ForwardOutput:
        hidden = self.hidden(batch, kv)
        return ForwardOutput(self.logits(hidden.normed[batch.logit_rows]), hidden.dimmed_pairs)

    def hidden(self, batch: ForwardBatch, kv: KvStorage, dimmed_pairs: Tensor | None = None) -> Hidden:
        """After the last layer and its norm. Dimmed pairs are counted in ``dimmed_pairs`` [T] int64, if given."""
        self.begin_step(batch)
        hidden, queries = self.begin(batch, kv, dimmed_pairs)
        for index in range(len(self.layers)):
            attended = self.attend(index, queries, batch, kv)
            hidden, queries = self.advance(index, hidden, attended, batch, kv)
        return hidden

    # The parts of a forward pass. A step with prompts in it runs the ones between attentions as CUDA graphs.

    def begin_step(self, batch: ForwardBatch) -> None:
        """What the layers' attention shares; goes before ``begin``."""
        self._attention.begin_step(batch.attention, self._spec.num_kv_heads)

    def begin(self, batch: ForwardBatch, kv: KvStorage, dimmed_pairs: Tensor | None = None) -> tuple[Hidden, Tensor]:
        """Embeds the tokens; returns the first layer's queries [T, num_heads, head_dim], its KV being stored."""
        if dimmed_pairs is None:
            dimmed_pairs = torch.empty_like(batch.positions, dtype=torch.int64)
        x, cos, sin = self._kernels.embed(batch.token_ids, batch.positions, self._embedding, self._rotary, dimmed_pairs)
        hidden = Hidden(x, self.layers[0].input_norm(x), cos, sin, dimmed_pairs)
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
        x, normed = self._next_norms[index].add(x, layer.feed_forward(normed, batch.rows, hidden.dimmed_pairs))
        hidden = replace(hidden, residual=x, normed=normed)
        if index + 1 == len(self.layers):
            return hidden, x[:0]
        return hidden, self._queries(index + 1, hidden, batch, kv)

    def logits(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """[N', D] -> [N', V]"""
        return torch.mm(normed, self._lm_head.t(), out=out)

    def _queries(self, index: int, hidden: Hidden, batch: ForwardBatch, kv: KvStorage) -> Tensor:
        layer, slots = self.layers[index], batch.attention.slot_mapping
        qkv = layer.qkv(hidden.normed)
        if layer.head_norm is not None:
            qkv = layer.head_norm(qkv)
        return self._kernels.rotate_and_store(qkv, hidden.cos, hidden.sin, self._spec.num_heads, slots, kv, index)

    # Assembly

    def _layer(self, index: int, weights: Mapping[str, Tensor], dimmer: Dimmer | None) -> DecoderLayer:
        spec, kernels, prefix = self._spec, self._kernels, f"layers.{index}."
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        head_norm = None
        if spec.qk_norm:
            norms = (own["q_norm"], own["k_norm"])
            head_norm = kernels.head_norm(*norms, spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps)
        feed_forward: MoeLayer | DenseLayer
        if index in spec.dense_layers:
            feed_forward = DenseLayer(GatedMlp(own["mlp.gate_up"], own["mlp.down"]))
        else:
            feed_forward = self._moe_layer(index, own, dimmer)
        return DecoderLayer(
            input_norm=kernels.norm(own["input_norm"], spec.rms_norm_eps),
            qkv=kernels.linear(own["qkv"], own.get("qkv_bias")),
            head_norm=head_norm,
            output=kernels.output_linear(own["output"], own.get("output_bias")),
            post_attention_norm=kernels.norm(own["post_attention_norm"], spec.rms_norm_eps),
            feed_forward=feed_forward,
        )

    def _moe_layer(self, index: int, own: Mapping[str, Tensor], dimmer: Dimmer | None) -> MoeLayer:
        spec = self._spec
        shared = None
        if spec.shared_expert_size:
            shared = GatedMlp(own["shared_expert.gate_up"], own["shared_expert.down"])
        return self._kernels.moe_layer(
            index=index,
            gate=Gate(own["gate"], spec.num_experts_per_token, spec.norm_topk_prob),
            experts=PackedExperts(own["experts.gate_up"], own["experts.down"], spec.num_experts),
            shared_expert=shared,
            shared_gate=own.get("shared_gate"),
            dimmer=dimmer,
        )
