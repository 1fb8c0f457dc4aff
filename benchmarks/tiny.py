"""A real but tiny MoE model, so that what is measured is the path to the engine and not the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.scenario import REPOSITORY
from cluster.serve_file import IMPORT_PATH, ServeFile, parse_serve_document

MODEL = "tiny"
_DEMO_MODEL = REPOSITORY / "deploy/models/demo-random"
_OVERRIDES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "initializer_range": 0.5,  # so that no two logits are nearly equal and greedy tokens do not depend on the batch
}


def write_tiny_model(directory: Path) -> Path:
    """One layer, four experts of which two are chosen, the demo model's tokenizer; weights are drawn when loaded."""
    directory.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(_DEMO_MODEL / name, directory / name)
    config = json.loads((_DEMO_MODEL / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | _OVERRIDES))
    return directory


def tiny_serve_file(directory: Path, replicas: int = 1, **sections: Any) -> ServeFile:
    """The application that serves it, each replica with 64 places; ``sections`` replace parts of ``args``."""
    args = {
        "model": {
            "path": str(write_tiny_model(directory / MODEL)),
            "load_format": "random",
            "max_model_len": 1024,
        },
        "replicas": replicas,
        "num_threads": 1,
        "cache": {"num_blocks": 4096},
        "scheduler": {"max_num_seqs": 64, "max_num_batched_tokens": 256, "max_num_waiting": 1024},
        "controller": {"law": "static", "level": 0},
        "brownout": {"profile_repeats": 0},
    }
    return parse_serve_document(
        {
            "http_options": {"host": "127.0.0.1"},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
            "applications": [
                {"name": "tiny", "import_path": IMPORT_PATH, "route_prefix": "/", "args": {**args, **sections}}
            ],
        }
    )
