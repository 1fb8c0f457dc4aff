"""GPU tests: skipped without a GPU or Triton. TRITON_INTERPRET=1 runs those of single kernels on the CPU, slowly."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.models import write_checkpoint

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernel_device() -> torch.device:
    """Where a single Triton kernel can run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if INTERPRETED:
        return torch.device("cpu")
    pytest.skip("needs an NVIDIA GPU, or TRITON_INTERPRET=1")


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE's directory, weights included."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
