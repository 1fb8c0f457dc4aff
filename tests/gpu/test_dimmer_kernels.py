"""The dimmer's Triton twin against the plain one: every dimmer, alone and against another one in the other phase."""

from __future__ import annotations

import pytest
import torch

from engine.batch import RowInfo
from engine.moe.dimmer import Dimmer
from engine.moe.gate import Routing
from tests.dimming import FAMILIES, SETTINGS, make_dimmer, make_rows, setting_id

triton = pytest.importorskip("triton")
dimmer_kernels = pytest.importorskip("engine.moe.dimmer_kernels")
fused_routing = pytest.importorskip("engine.moe.fused_routing")

pytestmark = pytest.mark.gpu

NUM_EXPERTS = 60
TOP_K = 4
NUM_TOKENS = 37
HIDDEN = 96
STRONGEST = [setting_id(family[-1]) for family in FAMILIES.values()]
MIXED = [(a, b) for a, b in zip(STRONGEST, STRONGEST[1:] + STRONGEST[:1], strict=True)]


def mixed_rows(num_tokens: int, levels: tuple[int, int], device: torch.device) -> RowInfo:
    """Half prefill, half decode rows; every fifth refuses to be dimmed; the last two only pad."""
    rows = torch.arange(num_tokens, device=device)
    return make_rows((rows >= num_tokens // 2).long(), levels, rows % 5 == 4, rows < max(1, num_tokens - 2))


def check_equal(dimmer: Dimmer, rows: RowInfo, top_k: int = TOP_K) -> None:
    device, num_tokens, num_experts = rows.phase.device, len(rows.phase), len(dimmer.identity)
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(device)
    router = torch.randn(triton.next_power_of_2(num_experts + 9), HIDDEN, generator=generator).to(device) / 4
    choice = fused_routing.choose(x, router, num_experts, top_k, False, dimmer.num_packed, rows, dimmer, 1)
    assert choice.routing.probs is not None
    plain = Routing(choice.routing.ids.long(), choice.routing.weights.clone(), choice.routing.probs[:, :num_experts])
    expected = dimmer.rewrite(1, plain, rows)
    dimmed_pairs = torch.full_like(rows.phase, 3)
    after = choice.routing
    dimmer_kernels.rewrite_(dimmer, 1, after, choice.use, rows, dimmed_pairs)
    assert torch.equal(after.ids.long(), expected.routing.ids)
    torch.testing.assert_close(after.weights, expected.routing.weights)
    assert torch.equal(dimmed_pairs - 3, expected.dimmed_pairs)


@pytest.mark.parametrize("setting", range(1, len(SETTINGS)))
def test_each_setting_equals_the_dimmer(kernel_device: torch.device, setting: int) -> None:
    dimmer = make_dimmer(NUM_EXPERTS, TOP_K, protected=(5, 30), device=kernel_device)
    check_equal(dimmer, mixed_rows(NUM_TOKENS, (0, setting), kernel_device))


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_with_code_for_one_dimmer_only_equal_it(kernel_device: torch.device, family: str) -> None:
    settings = [SETTINGS[0], *FAMILIES[family]]
    dimmer = make_dimmer(NUM_EXPERTS, TOP_K, protected=(5, 30), device=kernel_device, settings=settings)
    check_equal(dimmer, mixed_rows(NUM_TOKENS, (1, len(settings) - 1), kernel_device))


@pytest.mark.parametrize("levels", MIXED)
@pytest.mark.parametrize("num_tokens", [1, 40, 300])
def test_two_phases_equal_the_dimmer(kernel_device: torch.device, levels: tuple[int, int], num_tokens: int) -> None:
    dimmer = make_dimmer(NUM_EXPERTS, TOP_K, protected=(5, 30), device=kernel_device)
    check_equal(dimmer, mixed_rows(num_tokens, levels, kernel_device))


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8)])
@pytest.mark.parametrize("levels", MIXED[::3])
def test_other_models_equal_the_dimmer(
    kernel_device: torch.device, num_experts: int, top_k: int, levels: tuple[int, int]
) -> None:
    settings = [s for s in SETTINGS if s.keep <= top_k and s.budget <= num_experts and max(s.top_k, default=0) <= top_k]
    levels = tuple(level % len(settings) for level in levels)  # type: ignore[assignment]
    dimmer = make_dimmer(num_experts, top_k, device=kernel_device, settings=settings)
    check_equal(dimmer, mixed_rows(NUM_TOKENS, levels, kernel_device), top_k)


def test_level_0_leaves_the_routing_bit_identical(kernel_device: torch.device) -> None:
    dimmer, rows = make_dimmer(NUM_EXPERTS, TOP_K, device=kernel_device), mixed_rows(64, (0, 0), kernel_device)
    generator = torch.Generator().manual_seed(0)
    x, router = (torch.randn(64, HIDDEN, generator=generator).to(kernel_device) for _ in range(2))
    choice = fused_routing.choose(x, router / 4, NUM_EXPERTS, TOP_K, False, dimmer.num_packed, rows, dimmer, 0)
    alone = fused_routing.choose(x, router / 4, NUM_EXPERTS, TOP_K, False, dimmer.num_packed, rows, None, 0)
    dimmed_pairs = torch.zeros(64, dtype=torch.int64, device=kernel_device)
    after = choice.routing
    dimmer_kernels.rewrite_(dimmer, 0, after, choice.use, rows, dimmed_pairs)
    assert torch.equal(after.ids, alone.routing.ids)
    assert torch.equal(after.weights, alone.routing.weights)
    assert dimmed_pairs.sum() == 0
