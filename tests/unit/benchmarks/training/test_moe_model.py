"""The trainable model: its ways to compute experts agree, and what it saves is what transformers and Qwen2-MoE mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.training.expert_compute import EXPERT_COMPUTE
from benchmarks.training.moe_model import MoeConfig, MoeLm

CONFIG = MoeConfig(
    vocab_size=97, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, expert_size=16, shared_size=24,
    num_experts=8, num_experts_per_token=3, head_dim=16, max_position=64,
)  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "padded", "grouped"])
def test_ways_to_compute_experts_agree_with_the_loop(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(*shape, generator=generator) for shape in ((40, 32), (8, 32, 32), (8, 32, 16)))
    gate_up, down = gate_up / 6, down / 4
    weights, ids = torch.randn(40, 8, generator=generator).softmax(dim=1).topk(3)
    results = []
    for compute in (EXPERT_COMPUTE["loop"], EXPERT_COMPUTE[name]):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate_up, down)]
        output = compute(leaves[0], ids, weights, *leaves[1:])
        output.square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    tolerance = 0.02 if name == "grouped" else 1e-5  # it computes in bfloat16
    for wanted, got in zip(*results, strict=True):
        assert float((got - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_saved_weights_give_the_same_logits_in_transformers(tmp_path: Path, norm_topk_prob: bool) -> None:
    from dataclasses import replace

    from transformers import Qwen2MoeForCausalLM

    model = MoeLm(replace(CONFIG, norm_topk_prob=norm_topk_prob))
    model.init_weights(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # as saved
    model.save(tmp_path)
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    reference = Qwen2MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], reference(tokens).logits, rtol=1e-4, atol=1e-4)
