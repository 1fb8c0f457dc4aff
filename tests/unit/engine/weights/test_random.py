from __future__ import annotations

import torch

from engine.weights.manifest import Init, TensorSpec
from engine.weights.random import INITIALIZER_RANGE, RandomWeights

SPECS = [TensorSpec(f"layers.{index}.weight", (8, 64)) for index in range(4)]


def test_a_tensor_depends_on_seed_and_name_not_on_the_order_of_reading() -> None:
    forwards, backwards = RandomWeights(3), RandomWeights(3)
    there = {spec.name: forwards.get(spec) for spec in SPECS}
    back = {spec.name: backwards.get(spec) for spec in reversed(SPECS)}
    for name, tensor in there.items():
        assert torch.equal(tensor, back[name])
    assert len({tensor.sum().item() for tensor in there.values()}) == len(SPECS)
    assert not torch.equal(RandomWeights(4).get(SPECS[0]), there[SPECS[0].name])


def test_the_largest_seed_works() -> None:
    assert RandomWeights((1 << 32) - 1).get(SPECS[0]).isfinite().all()


def test_initial_values() -> None:
    source = RandomWeights(0)
    assert abs(source.get(TensorSpec("w", (100, 100))).std().item() - INITIALIZER_RANGE) < 0.001
    assert source.get(TensorSpec("norm", (5,), Init.ONES)).tolist() == [1.0] * 5
    assert source.get(TensorSpec("bias", (5,), Init.ZEROS)).tolist() == [0.0] * 5
