from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.models.registry import load_spec
from tests.models import FAMILIES, TINY_CONFIG, write_config


def test_reads_the_facts(tmp_path: Path) -> None:
    spec = load_spec(write_config(tmp_path))
    assert (spec.num_layers, spec.hidden_size, spec.num_experts, spec.num_experts_per_token) == (3, 64, 12, 4)
    assert (spec.head_dim, spec.q_size, spec.kv_size) == (16, 64, 32)
    assert (spec.rope_theta, spec.max_position, spec.dtype) == (10000.0, 512, "float32")


@pytest.mark.parametrize(
    ("extra", "theta"),
    [({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5), ({"rope_theta": 2e4}, 2e4)],
)
def test_rope_theta_old_and_new_spelling(tmp_path: Path, extra: dict[str, Any], theta: float) -> None:
    assert load_spec(write_config(tmp_path, **extra)).rope_theta == theta


@pytest.mark.parametrize(
    ("overrides", "mentioned"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architectures", "GPT2LMHeadModel", "Qwen2MoeForCausalLM"]),
        ({"architectures": []}, ["architectures", "(none)", "Qwen2MoeForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step", "0", "1"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "True", "False"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type", "'yarn'", "'default'"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters", "all layers"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor", "0.25"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "unquantised"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "weight_block_size"]),
        (FAMILIES["mixtral"] | {"sliding_window": 128}, ["sliding_window", "128", "512"]),
        (FAMILIES["mistral"] | {"sliding_window": 128}, ["sliding_window", "128"]),
        (FAMILIES["llama"] | {"mlp_bias": True}, ["mlp_bias", "True", "False"]),
        (FAMILIES["llama"] | {"rope_parameters": {"rope_type": "llama3"}}, ["lacks the key 'factor'"]),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, overrides: dict[str, Any], mentioned: list[str]) -> None:
    expect_refusal(write_config(tmp_path, **overrides), *mentioned)


@pytest.mark.parametrize("overrides", [{"use_sliding_window": True, "sliding_window": 512}, FAMILIES["mixtral"]])
def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert load_spec(write_config(tmp_path, **(overrides | {"sliding_window": 512}))).max_position == 512


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_wrote_says_the_same(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig

    ours = load_spec(write_config(tmp_path, **FAMILIES[family]))
    AutoConfig.for_model(**(TINY_CONFIG | FAMILIES[family])).save_pretrained(tmp_path)
    assert load_spec(tmp_path) == ours


def test_families_differ_by_facts(tmp_path: Path) -> None:
    specs = {family: load_spec(write_config(tmp_path / family, **FAMILIES[family])) for family in FAMILIES}
    assert {family for family, spec in specs.items() if spec.qk_norm} == {"qwen3_moe", "qwen3"}
    assert {family for family, spec in specs.items() if not spec.moe_layers} == {"qwen2", "qwen3", "llama", "mistral"}
    assert specs["qwen2_moe, dense layers"].moe_layers == (1,)
    assert specs["mixtral"].norm_topk_prob and specs["mixtral"].expert_size == 128


def test_missing_key(tmp_path: Path) -> None:
    directory = write_config(tmp_path)
    config = {key: value for key, value in TINY_CONFIG.items() if key != "num_experts"}
    (directory / "config.json").write_text(json.dumps(config))
    expect_refusal(directory, "lacks the key 'num_experts'")


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_not_a_json_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    expect_refusal(tmp_path, "config.json", "JSON")


def test_missing_directory(tmp_path: Path) -> None:
    expect_refusal(tmp_path / "nowhere", "model.path", "no config.json")


def expect_refusal(directory: Path, *mentioned: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_spec(directory)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in mentioned), str(refusal.value)
