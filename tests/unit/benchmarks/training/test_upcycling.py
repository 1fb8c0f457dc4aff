"""The mixture made of a dense parent starts equal to it, and stops being so when neurons are drawn anew."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training.moe_model import MoeLm
from benchmarks.training.smollm2 import DenseLm, cluster_directions, mixture_config, redraw_neurons_, upcycle


@pytest.fixture(scope="module")
def parent() -> DenseLm:
    config = mixture_config(
        size=64, vocab_size=101, hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16,
        max_position=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DenseLm(config, 64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(101, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mixture(parent: DenseLm, tokens: torch.Tensor) -> MoeLm:
    return upcycle(parent, tokens, "loop", seed=0)


@torch.no_grad()
def test_the_mixture_starts_equal_to_its_parent(parent: DenseLm, mixture: MoeLm, tokens: torch.Tensor) -> None:
    assert (mixture.config.num_experts, mixture.config.num_experts_per_token) == (60, 4)
    torch.testing.assert_close(mixture(tokens)[0], parent(tokens), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_redrawn_neurons_make_copies_differ(parent: DenseLm, mixture: MoeLm, tokens: torch.Tensor) -> None:
    moe = mixture.layers[0].moe
    assert torch.equal(moe.down[0], moe.down[4])  # two copies of the first routed segment
    redraw_neurons_(mixture, 0.5, seed=0)
    changed = (moe.down[0] != moe.down[4]).any(dim=0).float().mean()
    assert 0.5 < float(changed) < 1.0
    assert float((mixture(tokens)[0] - parent(tokens)).abs().max()) > 0.01


def test_cluster_directions_share_tokens_out() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 40, generator=generator)
    x = 3.0 + centres.repeat_interleave(50, dim=0) + 0.1 * torch.randn(250, 40, generator=generator)
    chosen = (x @ cluster_directions(x, 5, seed=3).t()).argmax(dim=1).view(5, 50)
    assert all(len(set(group.tolist())) == 1 for group in chosen)  # a cluster stays together
    assert len(set(chosen[:, 0].tolist())) >= 3
