"""A model's parameters as data: under which key the decoder finds each, and which checkpoint tensors fill it.

Letters: see engine/types.py. Checkpoint names are Hugging Face's. The same list loads a checkpoint, checks it for
missing and unexpected tensors, sizes it, and writes a random one.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.models.spec import ModelSpec
from engine.weights.manifest import Init, Parameter, Part, TensorSpec, stack


def model_parameters(spec: ModelSpec, num_united: Mapping[int, int] | None = None) -> dict[str, Parameter]:
    """Every parameter of the model by key; those of layer i start with ``layers.i.``.

    ``num_united``: layer |-> united experts to leave room for behind its originals.
    """
    vocabulary = (spec.vocab_size, spec.hidden_size)
    parameters = {"embedding": stack(TensorSpec("model.embed_tokens.weight", vocabulary))}
    for index in range(spec.num_layers):
        layer = _attention(spec, index)
        if index in spec.dense_layers:
            layer |= _gated_mlp("mlp", f"model.layers.{index}.mlp.", spec.hidden_size, spec.dense_size)
        else:
            layer |= _moe(spec, index, (num_united or {}).get(index, 0))
        parameters |= {f"layers.{index}.{key}": parameter for key, parameter in layer.items()}
    parameters["norm"] = _norm("model.norm.weight", spec.hidden_size)
    if not spec.tie_word_embeddings:
        parameters["lm_head"] = stack(TensorSpec("lm_head.weight", vocabulary))
    return parameters


def checkpoint_tensors(spec: ModelSpec) -> list[TensorSpec]:
    """The tensors of a checkpoint of this model, in the order of its layers."""
    return [part.spec for parameter in model_parameters(spec).values() for part in parameter.parts]


def _attention(spec: ModelSpec, index: int) -> dict[str, Parameter]:
    layer = f"model.layers.{index}."
    attention = f"{layer}self_attn."
    sizes = {"q_proj": spec.q_size, "k_proj": spec.kv_size, "v_proj": spec.kv_size}
    parameters = {
        "input_norm": _norm(f"{layer}input_layernorm.weight", spec.hidden_size),
        "qkv": stack(*(TensorSpec(f"{attention}{p}.weight", (n, spec.hidden_size)) for p, n in sizes.items())),
        "output": stack(TensorSpec(f"{attention}o_proj.weight", (spec.hidden_size, spec.q_size))),
        "post_attention_norm": _norm(f"{layer}post_attention_layernorm.weight", spec.hidden_size),
    }
    if spec.qkv_bias:
        biases = (TensorSpec(f"{attention}{p}.bias", (n,), Init.ZEROS) for p, n in sizes.items())
        parameters["qkv_bias"] = stack(*biases)
    if spec.output_bias:
        parameters["output_bias"] = stack(TensorSpec(f"{attention}o_proj.bias", (spec.hidden_size,), Init.ZEROS))
    if spec.qk_norm:
        parameters["q_norm"] = _norm(f"{attention}q_norm.weight", spec.head_dim)
        parameters["k_norm"] = _norm(f"{attention}k_norm.weight", spec.head_dim)
    return parameters


def _moe(spec: ModelSpec, index: int, num_united: int) -> dict[str, Parameter]:
    names, size, hidden = spec.moe_names, spec.expert_size, spec.hidden_size
    block = f"model.layers.{index}.{names.block}."
    gate_up, down = [], []
    for expert in range(spec.num_experts):
        prefix = f"{block}experts.{expert}."
        gate_up.append(Part(TensorSpec(f"{prefix}{names.gate}.weight", (size, hidden)), 0, expert))
        gate_up.append(Part(TensorSpec(f"{prefix}{names.up}.weight", (size, hidden)), size, expert))
        down.append(Part(TensorSpec(f"{prefix}{names.down}.weight", (hidden, size)), 0, expert))
    num_packed = spec.num_experts + num_united
    parameters = {
        "gate": stack(TensorSpec(f"{block}gate.weight", (spec.num_experts, hidden))),
        "experts.gate_up": Parameter((num_packed, 2 * size, hidden), tuple(gate_up)),
        "experts.down": Parameter((num_packed, hidden, size), tuple(down)),
    }
    if spec.shared_expert_size:
        parameters |= _gated_mlp("shared_expert", f"{block}shared_expert.", hidden, spec.shared_expert_size)
        parameters["shared_gate"] = stack(TensorSpec(f"{block}shared_expert_gate.weight", (1, hidden)))
    return parameters


def _gated_mlp(key: str, prefix: str, hidden: int, size: int) -> dict[str, Parameter]:
    inward = (TensorSpec(f"{prefix}{p}.weight", (size, hidden)) for p in ("gate_proj", "up_proj"))
    return {
        f"{key}.gate_up": stack(*inward),
        f"{key}.down": stack(TensorSpec(f"{prefix}down_proj.weight", (hidden, size))),
    }


def _norm(name: str, size: int) -> Parameter:
    return stack(TensorSpec(name, (size,), Init.ONES))
