"""Which architectures can be served: the name in config.json |-> how to read its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.models import families
from engine.models.spec import ModelSpec, read_config

SPEC_READERS: dict[str, Callable[[dict[str, Any]], ModelSpec]] = {
    "Qwen2MoeForCausalLM": families.qwen2_moe,
    "Qwen3MoeForCausalLM": families.qwen3_moe,
    "MixtralForCausalLM": families.mixtral,
    "Qwen2ForCausalLM": families.qwen2,
    "Qwen3ForCausalLM": families.qwen3,
    "LlamaForCausalLM": families.llama,
    "MistralForCausalLM": families.mistral,
}


def load_spec(directory: str | Path) -> ModelSpec:
    """The spec of a Hugging Face directory. Raises ConfigError for an unknown architecture or a missing key."""
    config = read_config(Path(directory))
    architectures = config.get("architectures") or ["(none)"]
    reader = SPEC_READERS.get(architectures[0])
    if reader is None:
        raise ConfigError(f"architectures in {directory}/config.json is {architectures}; allowed: {list(SPEC_READERS)}")
    try:
        return reader(config)
    except KeyError as error:
        raise ConfigError(f"{directory}/config.json lacks the key {error}") from error
