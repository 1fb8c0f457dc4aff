"""The families that can be served: how each one's config.json is read. They differ by facts, not by code.

A key that changes the mathematics in a way that is not computed here is refused by name, never ignored.
"""

from __future__ import annotations

from typing import Any

from engine.config import ConfigError
from engine.models.spec import ModelSpec, MoeNames, RopeScaling

Config = dict[str, Any]


def qwen2_moe(config: Config) -> ModelSpec:
    """Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B: a gated shared expert beside the routed ones."""
    _refuse_sliding_window(config, switched=True)
    return _spec(
        config,
        **_routed(config, dense_layers=_dense_layers(config)),
        shared_expert_size=config["shared_expert_intermediate_size"],
        qkv_bias=config.get("qkv_bias", True),
    )


def qwen3_moe(config: Config) -> ModelSpec:
    """Qwen3-30B-A3B, Qwen3-235B-A22B: normalised queries and keys, no shared expert."""
    _refuse_sliding_window(config, switched=True)
    return _spec(config, **_routed(config, dense_layers=_dense_layers(config)), **_attention_bias(config), qk_norm=True)


def mixtral(config: Config) -> ModelSpec:
    """Mixtral-8x7B, Mixtral-8x22B: few wide experts."""
    _refuse_sliding_window(config, switched=False)
    return _spec(
        config,
        default_rope_theta=1e6,
        num_experts=config["num_local_experts"],
        num_experts_per_token=config["num_experts_per_tok"],
        expert_size=config["intermediate_size"],
        norm_topk_prob=True,
        moe_names=MoeNames(block="block_sparse_moe", gate="w1", up="w3", down="w2"),
    )


def qwen2(config: Config) -> ModelSpec:
    """Qwen1.5, Qwen2, Qwen2.5: dense, with biased queries, keys and values."""
    _refuse_sliding_window(config, switched=True)
    return _spec(config, **_dense(config), qkv_bias=True)


def qwen3(config: Config) -> ModelSpec:
    """Qwen3: dense, with normalised queries and keys."""
    _refuse_sliding_window(config, switched=True)
    default_head_dim = 128  # transformers' Qwen3Config
    return _spec({"head_dim": default_head_dim} | config, **_dense(config), **_attention_bias(config), qk_norm=True)


def llama(config: Config) -> ModelSpec:
    """Llama 2, Llama 3, and what copies their layout."""
    _require(config, "mlp_bias", False)
    return _spec(config, **_dense(config), **_attention_bias(config))


def mistral(config: Config) -> ModelSpec:
    """Mistral-7B: Llama's layout; its first version has a sliding window, which is refused."""
    default_window = 4096  # transformers' MistralConfig
    _refuse_sliding_window({"sliding_window": default_window} | config, switched=False)
    return _spec(config, **_dense(config))


def _spec(config: Config, default_rope_theta: float = 1e4, **family: Any) -> ModelSpec:
    """The facts that all families spell alike, and ``family``, which says the others."""
    _require(config, "hidden_act", "silu")
    if not set(config.get("layer_types") or ()) <= {"full_attention"}:
        raise _refusal("layer_types", sorted(set(config["layer_types"])), "full_attention only")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    facts: dict[str, Any] = {
        "num_experts": 0,
        "num_experts_per_token": 0,
        "expert_size": 0,
        "shared_expert_size": 0,
        "norm_topk_prob": False,
        "qkv_bias": False,
    }
    num_heads = config["num_attention_heads"]
    return ModelSpec(
        architecture=config["architectures"][0],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or default_rope_theta),
        rope_scaling=_rope_scaling(config, rope),
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_position=config["max_position_embeddings"],
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        fp8_block=_fp8_block(config.get("quantization_config")),
        **(facts | family),
    )


def _fp8_block(quantization: Config | None) -> tuple[int, int] | None:
    """Rows and columns of a block of fp8 weights that share a scale; None: the weights are unquantised."""
    if quantization is None:
        return None
    block = quantization.get("weight_block_size")
    if quantization.get("quant_method") != "fp8" or not block:
        raise _refusal("quantization_config", quantization, "none (unquantised), or fp8 with a weight_block_size")
    rows, columns = block
    return int(rows), int(columns)


def _dense(config: Config) -> Config:
    return {"dense_size": config["intermediate_size"], "dense_layers": tuple(range(config["num_hidden_layers"]))}


def _routed(config: Config, dense_layers: tuple[int, ...]) -> Config:
    num_experts = config["num_experts"] if "num_experts" in config else config.get("num_local_experts")
    if num_experts is None:
        raise KeyError("num_experts")
    return {
        "num_experts": num_experts,
        "num_experts_per_token": config["num_experts_per_tok"],
        "expert_size": config["moe_intermediate_size"],
        "norm_topk_prob": config.get("norm_topk_prob", False),
        "dense_size": config["intermediate_size"] if dense_layers else 0,
        "dense_layers": dense_layers,
    }


def _dense_layers(config: Config) -> tuple[int, ...]:
    """Every decoder_sparse_step-th layer is routed, but for those that mlp_only_layers names."""
    step = config.get("decoder_sparse_step", 1)
    if not step >= 1:
        raise _refusal("decoder_sparse_step", step, "1 or more")
    dense = set(config.get("mlp_only_layers") or ())
    return tuple(layer for layer in range(config["num_hidden_layers"]) if layer in dense or (layer + 1) % step)


def _attention_bias(config: Config) -> Config:
    bias = config.get("attention_bias", False)
    return {"qkv_bias": bias, "output_bias": bias}


def _rope_scaling(config: Config, rope: Config) -> RopeScaling | None:
    if any(isinstance(value, dict) for value in rope.values()):
        raise _refusal("rope_parameters", "different for each kind of layer", "one for all layers")
    for holder in (config, rope):
        _require(holder, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"  # "type" in configs before transformers 4.43
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            rope["original_max_position_embeddings"],
        )
    raise _refusal("rope_type", kind, "'default', 'linear', 'llama3'")


def _refuse_sliding_window(config: Config, switched: bool) -> None:
    """A window as long as the longest context is none. ``switched``: it counts only if use_sliding_window says so."""
    if switched and not config.get("use_sliding_window", False):
        return
    window, longest = config.get("sliding_window"), config["max_position_embeddings"]
    if window is not None and window >= longest:
        return
    if switched:
        raise _refusal("use_sliding_window", True, "False")
    if window is not None:
        raise _refusal("sliding_window", window, f"null, or at least max_position_embeddings ({longest})")


def _require(config: Config, key: str, wanted: object) -> None:
    value = config.get(key, wanted)
    if value != wanted and value is not None:
        shown = value if not isinstance(value, dict) else "set"
        raise _refusal(key, shown, "none, only unquantised weights" if wanted is None else repr(wanted))


def _refusal(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"config.json key {key} is {value!r}; allowed: {allowed}")
