"""The sorted, grouped computation against one token and one expert at a time."""

from __future__ import annotations

import torch

from engine.layers.linear import silu_and_mul
from engine.moe.experts import PackedExperts
from engine.moe.gate import Gate, Routing


def reference(experts: PackedExperts, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for expert, weight in zip(routing.ids[t].tolist(), routing.weights[t], strict=True):
            if expert < experts.gate_up.shape[0]:
                hidden = silu_and_mul(experts.gate_up[expert] @ x[t])
                out[t] += weight * (experts.down[expert] @ hidden)
    return out


def make_experts(num: int = 7, hidden: int = 16, size: int = 8) -> PackedExperts:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(num, 2 * size, hidden, generator=generator)
    return PackedExperts(gate_up, torch.randn(num, hidden, size, generator=generator), num_originals=num)


def test_equals_one_pair_at_a_time() -> None:
    experts = make_experts()
    x = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))
    routing = Gate(torch.randn(7, 16, generator=torch.Generator().manual_seed(2)), 3, False)(x)
    torch.testing.assert_close(experts(x, routing), reference(experts, x, routing), rtol=1e-4, atol=1e-4)


def test_pairs_without_an_expert_count_for_nothing() -> None:
    experts = make_experts()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[0, 7], [7, 6], [2, 3]]), torch.tensor([[0.5, 0.0], [0.0, 1.0], [0.3, 0.7]]))
    torch.testing.assert_close(experts(x, routing), reference(experts, x, routing), rtol=1e-4, atol=1e-4)


def test_gate_normalises_only_when_asked() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    assert (Gate(weight, 3, False)(x).weights.sum(1) < 0.9999).all()
    torch.testing.assert_close(Gate(weight, 3, True)(x).weights.sum(1), torch.ones(5))
