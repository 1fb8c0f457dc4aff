"""The dimmer: rewrites a routing result on the device so that fewer distinct experts are read.

Legend: T tokens, E original experts, U united experts, A experts per token, L layers.

Rule, for the rows of one step in one layer (truth table, by expert):

| expert is ...                                          | its dimmable pairs go to    |
| ------------------------------------------------------ | --------------------------- |
| hot: among the highest ranked that hold a share 1 - b  | the expert itself           |
| used by a row that keeps its experts (class full, ...) | the expert itself           |
| protected                                              | the expert itself           |
| the only cold expert of its group in this step         | the expert itself           |
| cold, with at least one more cold expert in its group  | the group's united expert   |

Experts are ranked by routed mass (`united`) or by token count (`paper`, arXiv 2507.17133). Rows keep their routed mass:
pairs of a token that meet in one united expert become one pair with the summed weight. Everything is a tensor with a
static shape, the level included, so a new level needs neither a host sync nor a new graph. For one way the dimmed
pairs at b are a subset of those at any b' > b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import RowInfo
from engine.moe.gate import Routing
from engine.moe.ladder import Ladder
from engine.moe.table import WAY_ROW


@dataclass(frozen=True, slots=True)
class Dimmed:
    routing: Routing
    dimmed_pairs: Tensor  # [T] int64


class Dimmer:
    """One per model; stateless between steps."""

    def __init__(
        self,
        ladder: Ladder,
        num_united: int,
        protected: Tensor,  # [L, E] bool
        rank_by_count: bool,
        device: torch.device,
    ) -> None:
        num_layers, num_experts = protected.shape
        self.protected = protected.to(device)
        self.rank_by_count = rank_by_count
        self.identity = torch.arange(num_experts, device=device)
        self.united_of = self.identity.repeat(num_layers, len(WAY_ROW), 1)  # [L, ways, E], filled by a UnitedTable
        self.num_packed = num_experts + num_united
        self.way_row = torch.tensor([WAY_ROW[level.way] for level in ladder.levels], device=device)
        self.share = torch.tensor([level.share for level in ladder.levels], device=device)

    def rewrite(self, layer: int, routing: Routing, rows: RowInfo) -> Dimmed:
        """Send the cold part of the dimmable pairs to united experts."""
        may_dim = (rows.levels[rows.phase] > 0) & ~rows.exact  # [T]
        remap = self._remap(layer, routing, may_dim, rows.levels)  # [2, E]
        ids = torch.where(may_dim[:, None], remap[rows.phase[:, None], routing.ids], routing.ids)
        dimmed_pairs = (ids != routing.ids).sum(dim=1)
        return Dimmed(self._merge_duplicates(ids, routing.weights), dimmed_pairs)

    def _remap(self, layer: int, routing: Routing, may_dim: Tensor, levels: Tensor) -> Tensor:
        """expert |-> packed id, for each phase: [2, E]."""
        num_experts = self.identity.shape[0]
        flat_ids = routing.ids.flatten()
        mass = torch.zeros(num_experts, device=flat_ids.device)
        pair_mass = torch.ones_like(routing.weights) if self.rank_by_count else routing.weights
        mass.index_add_(0, flat_ids, pair_mass.flatten().float())
        kept_pairs = (~may_dim)[:, None].expand_as(routing.ids).flatten()
        kept = torch.zeros(num_experts, device=flat_ids.device).index_add_(0, flat_ids, kept_pairs.float()) > 0

        ranked, order = mass.sort(descending=True, stable=True)
        mass_before = torch.empty_like(mass)
        mass_before[order] = ranked.cumsum(0) - ranked  # mass of the experts ranked above
        hot = mass_before < ((1 - self.share[levels]) * mass.sum())[:, None]  # [2, E]

        cold = (mass > 0) & ~hot & ~kept & ~self.protected[layer]
        united = self.united_of[layer, self.way_row[levels]]  # [2, E]
        num_cold = torch.zeros(2, self.num_packed, dtype=torch.int64, device=mass.device)
        num_cold.scatter_add_(1, united, cold.long())
        return torch.where(cold & (num_cold.gather(1, united) >= 2), united, self.identity)

    def _merge_duplicates(self, ids: Tensor, weights: Tensor) -> Routing:
        """Pairs of a row with one id become its first pair with the summed weight; the others get no expert."""
        first = (ids[:, :, None] == ids[:, None, :]).to(torch.int8).argmax(dim=2)  # [T, A] column of the first equal id
        is_first = first == torch.arange(ids.shape[1], device=ids.device)
        summed = torch.zeros_like(weights).scatter_add_(1, first, weights)
        return Routing(torch.where(is_first, ids, self.num_packed), summed)
