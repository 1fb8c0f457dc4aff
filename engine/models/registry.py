"""Which architectures can be served: the name in config.json |-> how to read its config and load its weights."""

from __future__ import annotations

from pathlib import Path

from engine.config import ConfigError
from engine.models import qwen2_moe
from engine.models.spec import ModelSpec, read_config

SPEC_READERS = {"Qwen2MoeForCausalLM": qwen2_moe.read_spec}


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
