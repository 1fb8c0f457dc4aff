"""United experts of a synthetic layer: the builds rank as the routed error says they must."""

from __future__ import annotations

import pytest
import torch

from engine.moe.united import consecutive_groups
from engine.unite.baselines import average, mixture_distil
from engine.unite.distil import DistilOptions, distil
from engine.unite.instant import instant_build
from engine.unite.pairs import LayerTrace, expert_hidden, routed_pairs
from engine.unite.united_layer import UnitedLayer, mean_error, routed_errors

NUM_EXPERTS, DIM, SIZE, NUM_CHOSEN = 16, 48, 24, 3
OPTIONS = DistilOptions(num_steps=250, num_tokens=512)


@pytest.fixture(scope="module")
def trace() -> LayerTrace:
    """Random experts, tokens in clusters as text has them, a router that knows the clusters."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    centres = normal(NUM_EXPERTS, DIM)
    inputs = centres[torch.randint(NUM_EXPERTS, (6000,), generator=generator)] + 0.7 * normal(6000, DIM)
    weights, ids = (inputs @ centres.t() / DIM).softmax(dim=1).topk(NUM_CHOSEN)
    gate_up = normal(NUM_EXPERTS, 2 * SIZE, DIM) / DIM**0.5
    return LayerTrace(gate_up, normal(NUM_EXPERTS, DIM, SIZE) / SIZE**0.5, inputs, ids, weights)


def held_out_error(united: UnitedLayer, trace: LayerTrace) -> float:
    return mean_error(routed_errors(united, routed_pairs(trace.rows(5000, 6000))))


def test_pairs_hold_what_each_expert_answered(trace: LayerTrace) -> None:
    pairs = routed_pairs(trace)
    assert pairs.starts[-1] == len(pairs.rows) == trace.ids.numel()
    for expert in (0, 7, 15):
        part = slice(pairs.starts[expert], pairs.starts[expert + 1])
        rows = pairs.rows[part]
        assert bool((trace.ids[rows] == expert).any(dim=1).all())
        chosen_weight = trace.weights[rows][trace.ids[rows] == expert]
        torch.testing.assert_close(pairs.loss_weights[part], chosen_weight.square())
        answer = expert_hidden(trace.gate_up[expert], trace.inputs[rows]) @ trace.down[expert].t()
        torch.testing.assert_close(pairs.targets[part], answer)


def test_error_is_zero_for_the_originals_and_one_for_nothing(trace: LayerTrace) -> None:
    pairs = routed_pairs(trace)
    alone = consecutive_groups(NUM_EXPERTS, 1)
    assert routed_errors(UnitedLayer(alone, trace.gate_up, trace.down), pairs) == pytest.approx([0.0] * 16, abs=1e-9)
    nothing = UnitedLayer(alone, trace.gate_up, torch.zeros_like(trace.down))
    assert routed_errors(nothing, pairs) == pytest.approx([1.0] * 16)


def test_builds_rank_by_their_held_out_error(trace: LayerTrace) -> None:
    seen = trace.rows(0, 5000)
    pairs = routed_pairs(seen)
    grouping = consecutive_groups(NUM_EXPERTS, 4)
    start = instant_build(seen, pairs, grouping)
    errors = [
        held_out_error(united, trace)
        for united in (
            distil(start, seen, pairs, OPTIONS),
            start,
            mixture_distil(seen, pairs, grouping, OPTIONS),
            average(seen, grouping),
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.6 * errors[2]
