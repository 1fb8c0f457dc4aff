"""How alike the outputs of a layer's experts are: what the dimmer "similar" (SERE, arXiv 2602.07616) needs.

Stored as one safetensors file, ``layer-NN`` |-> [E, E] float32 in [-1, 1], with the model's digest in its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.models.spec import ModelSpec
from engine.moe.experts import PackedExperts
from engine.moe.gate import Routing
from engine.moe.united import ArtefactError

DIGEST_KEY = "model_digest"


def output_similarity(experts: PackedExperts, x: Tensor) -> Tensor:
    """Mean cosine, over tokens x [T, D], of the outputs of every two original experts: [E, E]."""
    num_experts = experts.num_originals
    outputs = []
    ones = x.new_ones(len(x), 1)
    for expert in range(num_experts):
        ids = torch.full((len(x), 1), expert, device=x.device)
        outputs.append(F.normalize(experts(x, Routing(ids, ones)).float(), dim=1))
    flat = torch.stack(outputs).flatten(1)  # [E, T D]
    return flat @ flat.t() / len(x)


def write_similarity(path: Path, similarity: Mapping[int, Tensor], digest: str) -> None:
    tensors = {f"layer-{layer:02d}": table.float().cpu().contiguous() for layer, table in similarity.items()}
    save_file(tensors, path, metadata={DIGEST_KEY: digest})


def read_similarity(path: Path, spec: ModelSpec, digest: str) -> Tensor:
    """[L, E, E]; layers that the file lacks are alike to nothing. Raises ArtefactError."""
    table = torch.full((spec.num_layers, spec.num_experts, spec.num_experts), float("-inf"))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get(DIGEST_KEY) != digest:
                raise ArtefactError(f"similarities {path} were measured on another model")
            for name in file.keys():  # noqa: SIM118 (no mapping)
                table[int(name.removeprefix("layer-"))] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"similarities {path} cannot be read: {error}") from error
    if table.isnan().any():
        raise ArtefactError(f"similarities {path} hold values that are not numbers")
    return table
