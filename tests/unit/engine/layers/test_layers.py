from __future__ import annotations

import math

import pytest
import torch

from engine.layers.linear import GatedMlp, Linear
from engine.layers.norm import RmsNorm
from engine.layers.rotary import RotaryEmbedding, rotate


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_scales_each_row_to_the_weight() -> None:
    x, weight = 5 * randn(3, 8), randn(8, seed=1)
    expected = torch.stack([weight * row / math.sqrt(float(row @ row) / 8 + 1e-6) for row in x])
    torch.testing.assert_close(RmsNorm(weight, 1e-6)(x), expected)


def test_rms_norm_works_in_float32() -> None:
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # its square does not fit into float16
    norm = RmsNorm(torch.ones(8, dtype=torch.float16), 1e-6)
    torch.testing.assert_close(norm(x), torch.ones(1, 8, dtype=torch.float16))


def test_gated_mlp_packs_gate_then_up() -> None:
    gate, up, down, x = randn(6, 4), randn(6, 4, seed=1), randn(4, 6, seed=2), randn(3, 4, seed=3)
    z = x @ gate.T
    expected = (z * torch.sigmoid(z) * (x @ up.T)) @ down.T
    torch.testing.assert_close(GatedMlp(torch.cat([gate, up]), down)(x), expected)
    torch.testing.assert_close(Linear(gate, randn(6))(x), x @ gate.T + randn(6))


def test_rotary_turns_each_half_split_pair_by_its_angle() -> None:
    head_dim, theta = 8, 100.0
    rotary = RotaryEmbedding(head_dim, 32, theta, torch.device("cpu"))
    x, positions = randn(3, 2, head_dim), torch.tensor([0, 5, 31])
    out = rotate(x, *rotary.tables(positions))
    for row, position in enumerate(positions.tolist()):
        for pair in range(head_dim // 2):
            angle = position / theta ** (2 * pair / head_dim)
            turned = torch.view_as_complex(torch.stack((x[row, :, pair], x[row, :, pair + 4]), -1).contiguous())
            turned = turned * complex(math.cos(angle), math.sin(angle))
            torch.testing.assert_close(out[row, :, pair], turned.real, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out[row, :, pair + 4], turned.imag, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", [0, 3, 11])
def test_rotary_scores_depend_on_the_distance_only(distance: int) -> None:
    rotary = RotaryEmbedding(8, 64, 10_000.0, torch.device("cpu"))
    q, k = randn(1, 1, 8), randn(1, 1, 8, seed=1)

    def score(position: int) -> torch.Tensor:
        turned_q = rotate(q, *rotary.tables(torch.tensor([position + distance])))
        return (turned_q * rotate(k, *rotary.tables(torch.tensor([position])))).sum()

    torch.testing.assert_close(score(0), score(40), rtol=1e-4, atol=1e-4)
