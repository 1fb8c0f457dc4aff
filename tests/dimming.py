"""Settings of every dimmer, routings and rows for tests of the dimmer and of its Triton twin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import RowInfo
from engine.moe.dimmer import Dimmer
from engine.moe.gate import Gate, Routing
from engine.moe.settings import DimmerKind, DimSetting
from engine.moe.united import consecutive_groups, num_united
from tests.united import map_united

WAYS = (2, 4)

# Of one dimmer each, from weak to strong in the parameter that a ladder varies.
FAMILIES: dict[str, list[DimSetting]] = {
    "2-way": [DimSetting(DimmerKind.UNITED, way=2, share=b) for b in (0.25, 0.5, 0.75, 1.0)],
    "4-way": [DimSetting(DimmerKind.UNITED, way=4, share=b) for b in (0.25, 0.5, 0.75, 1.0)],
    "paper": [DimSetting(DimmerKind.PAPER, way=4, share=b) for b in (0.25, 0.5, 0.75, 1.0)],
    "piggyback": [DimSetting(DimmerKind.PIGGYBACK, keep=k) for k in (3, 2, 1)],
    "budget": [DimSetting(DimmerKind.PIGGYBACK, keep=1, budget=m) for m in (10, 8, 6, 4)],
    "similar": [DimSetting(DimmerKind.SIMILAR, keep=1, min_similarity=rho) for rho in (0.2, 0.0, -0.2, -1.0)],
    "topk": [DimSetting(DimmerKind.TOPK, top_k=(k,)) for k in (3, 2, 1)],
    "4-way of top 3": [DimSetting(DimmerKind.UNITED, way=4, share=b, top_k=(3,)) for b in (0.25, 0.5, 1.0)],
    "piggyback of top 2": [DimSetting(DimmerKind.PIGGYBACK, keep=k, top_k=(2,)) for k in (2, 1)],
    "similar of top 3": [DimSetting(DimmerKind.SIMILAR, keep=2, top_k=(3,), min_similarity=r) for r in (0.1, -1.0)],
}
SETTINGS = [DimSetting(), *(setting for family in FAMILIES.values() for setting in family)]


def setting_id(setting: DimSetting) -> int:
    return SETTINGS.index(setting)


def make_dimmer(
    num_experts: int,
    top_k: int,
    protected: tuple[int, ...] = (),
    device: torch.device | None = None,
    settings: Sequence[DimSetting] = SETTINGS,
) -> Dimmer:
    """Two layers alike, united experts of both ways."""
    mask = torch.zeros(2, num_experts, dtype=torch.bool)
    mask[:, list(protected)] = True
    outputs = torch.randn(num_experts, 16, generator=torch.Generator().manual_seed(0))
    outputs = torch.nn.functional.normalize(outputs, dim=1)
    dimmer = Dimmer(
        settings,
        sum(num_united(num_experts, way) for way in WAYS),
        mask,
        top_k,
        device or torch.device("cpu"),
        similarity=(outputs @ outputs.t()).expand(2, -1, -1).contiguous(),
    )
    map_united(dimmer.united_of, [consecutive_groups(num_experts, way) for way in WAYS])
    return dimmer


def random_routing(seed: int, num_tokens: int, num_experts: int, top_k: int, normalise: bool = False) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    gate = Gate(torch.randn(num_experts, 16, generator=generator) / 3, top_k, normalise)
    return gate(torch.randn(num_tokens, 16, generator=generator))


def make_rows(
    phase: Tensor, levels: tuple[int, int], exact: Tensor | None = None, valid: Tensor | None = None
) -> RowInfo:
    """``levels``: setting of prefill and of decode rows."""
    never = torch.zeros(len(phase), dtype=torch.bool, device=phase.device)
    return RowInfo(
        phase=phase,
        exact=never if exact is None else exact,
        valid=~never if valid is None else valid,
        levels=torch.tensor(levels, device=phase.device),
        host_levels=levels,
    )
