"""The dimmer: rewrites a routing result on the device so that fewer distinct experts are read.

Legend: T tokens, E original experts, A experts per token, N packed experts, L layers, S settings.

What the pairs of a row that may be dimmed become, in one layer of one step, by the setting of the row's phase:

| setting                                  | a pair (row, expert)                                                   |
| ---------------------------------------- | ---------------------------------------------------------------------- |
| any, with top_k                          | beyond the row's best top_k: none, the row's others share its weight   |
| united: expert outside the hot mass 1-b, | the united expert of the group                                         |
| with another such expert in its group    |                                                                        |
| paper                                    | the same, hot by token count instead of routed mass                    |
| piggyback: expert not among the active   | the row's best other expert that is; active are the experts that some  |
|                                          | row keeps, and by routed mass as many more as the budget allows        |
| similar: expert that no row keeps        | the most similar expert that some row keeps, if similar enough         |
| any other                                | itself                                                                 |

Whatever the setting: experts used by a row that is not dimmed at all (class full, or a phase at level 0) are active
and hot; protected experts keep their pairs; a row keeps its routed mass, and pairs of it that meet in one expert become
one. Padding rows count for nothing. Everything is a tensor with a static shape, the setting included, so that a new
level needs neither a host sync nor a new graph. Pairs dimmed at a weaker setting of one dimmer are also dimmed at a
stronger one (piggyback and similar after a cut excepted: they may give a row back what the cut took).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import RowInfo
from engine.config import ConfigError
from engine.moe.gate import Routing
from engine.moe.settings import USES_KEEP, USES_UNITED, DimmerKind, DimSetting
from engine.moe.table import WAY_ROW

MAX_SETTINGS = 256  # room in the tables, so that another ladder can be put in place of one in use
UNITED, PAPER, PIGGYBACK, SIMILAR = (
    int(kind) for kind in (DimmerKind.UNITED, DimmerKind.PAPER, DimmerKind.PIGGYBACK, DimmerKind.SIMILAR)
)


@dataclass(frozen=True, slots=True)
class Dimmed:
    routing: Routing
    dimmed_pairs: Tensor  # [T] int64


@dataclass(frozen=True, slots=True)
class _Use:
    """How a step uses the experts of a layer. All [E]."""

    mass: Tensor  # routed weight
    count: Tensor  # pairs
    used: Tensor  # bool
    staying: Tensor  # bool: a row that is not dimmed uses it, or it is used and protected
    kept: Tensor | None  # bool: among the best ``keep`` of some row; None if no setting asks


class Dimmer:
    """One per model; stateless between steps. Its tables are only ever written in place: captured graphs read them.

    ``rewrite`` changes none of its inputs and calls no operation that torch.vmap lacks: calibration maps it over steps.
    """

    def __init__(
        self,
        settings: Sequence[DimSetting],
        num_united: int,
        protected: Tensor,  # [L, E] bool
        num_experts_per_token: int,
        device: torch.device,
        similarity: Tensor | None = None,  # [L, E, E]
    ) -> None:
        num_layers, num_experts = protected.shape
        self.num_experts_per_token = num_experts_per_token
        self.protected = protected.to(device)
        self.identity = torch.arange(num_experts, device=device)
        self._columns = torch.arange(num_experts_per_token, device=device)
        self.united_of = self.identity.repeat(num_layers, len(WAY_ROW), 1)  # [L, ways, E], filled by a UnitedTable
        self.num_packed = num_experts + num_united
        self._beyond = torch.arange(num_experts, self.num_packed + 1, device=device).expand(2, -1)
        self.similarity = None if similarity is None else similarity.to(device, torch.float32)

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(MAX_SETTINGS, *shape, dtype=dtype, device=device)

        # [S], one entry for each setting; entry 0 is exact.
        self.kind, self.way_row, self.keep, self.budget = table(), table(), table(), table()
        self.share, self.min_similarity = table(dtype=torch.float32), table(dtype=torch.float32)
        self.top_k = table(num_layers)  # [S, L]
        self._kinds: tuple[DimmerKind, ...] = ()
        self._cuts: tuple[bool, ...] = ()
        self._compiled: tuple[frozenset[DimmerKind], bool] | None = None  # see `compile_for`
        self.set_settings(settings)

    @property
    def kinds(self) -> frozenset[DimmerKind]:
        """Of the settings, or all that kernels shall have code for."""
        return frozenset(self._kinds) if self._compiled is None else self._compiled[0]

    @property
    def cuts(self) -> bool:
        """Whether some setting has a top_k, or may get one."""
        return any(self._cuts) if self._compiled is None else self._compiled[1]

    @property
    def keeps(self) -> bool:
        """Whether some setting asks for the best ``keep`` of each row."""
        return not self.kinds.isdisjoint((DimmerKind.PIGGYBACK, DimmerKind.SIMILAR))

    def compile_for(self, everything: bool) -> None:
        """Call before graphs capture kernels: these have code for the dimmers of the settings only, and from now on no
        others can be set; or they have it for ``everything``."""
        self._compiled = (frozenset(DimmerKind), True) if everything else (self.kinds, self.cuts)

    def check_settings(self, settings: Sequence[DimSetting]) -> None:
        """Raises ConfigError for settings that this model or this engine cannot be dimmed by."""
        num_layers, num_experts = self.protected.shape
        if len(settings) > MAX_SETTINGS:
            raise ConfigError(f"brownout.ladder has {len(settings)} distinct settings; allowed: {MAX_SETTINGS}")
        for setting in settings:
            setting.check(num_layers, num_experts, self.num_experts_per_token)
            if setting.kind is DimmerKind.SIMILAR and self.similarity is None:
                raise ConfigError(f"level {setting.name} needs brownout.similarity, a file of expert similarities")
            if self._compiled is not None:
                kinds, cuts = self._compiled
                if setting.kind not in kinds or (setting.top_k and not cuts):
                    known = ", ".join(kind.name.lower() for kind in DimmerKind if kind in kinds)
                    raise ConfigError(
                        f"level {setting.name} dims in a way that no level did at start, when kernels were captured; "
                        f"allowed while serving: {known}{', and a top_k' if cuts else ' without a top_k'}"
                    )

    def set_settings(self, settings: Sequence[DimSetting]) -> None:
        """Put other settings in place, the first of them exact. Raises ConfigError; then nothing has changed."""
        self.check_settings(settings)
        for target, values in (
            (self.kind, [int(s.kind) for s in settings]),
            (self.way_row, [WAY_ROW[s.way] for s in settings]),
            (self.keep, [s.keep for s in settings]),
            (self.budget, [s.budget for s in settings]),
            (self.share, [s.share for s in settings]),
            (self.min_similarity, [s.min_similarity for s in settings]),
            (self.top_k, [self._top_k_by_layer(s) for s in settings]),
        ):
            target[: len(settings)] = torch.tensor(values, dtype=target.dtype)
        self._kinds = tuple(setting.kind for setting in settings)
        self._cuts = tuple(bool(setting.top_k) for setting in settings)

    def _top_k_by_layer(self, setting: DimSetting) -> list[int]:
        num_layers = len(self.protected)
        top_k = setting.top_k or (self.num_experts_per_token,)
        return list(top_k) * (num_layers // len(top_k))

    def rewrite(self, layer: int, routing: Routing, rows: RowInfo) -> Dimmed:
        """Dim the rows that may be, each by the setting of its phase."""
        kinds, cuts = self._used(rows)
        setting_of_row = rows.levels[rows.phase]  # [T]
        may_dim = (setting_of_row > 0) & ~rows.exact & rows.valid  # [T]
        ids = torch.where(rows.valid[:, None], routing.ids, self.num_packed)
        weights = torch.where(rows.valid[:, None], routing.weights, 0)
        if cuts:
            ids, weights = self._cut(layer, ids, weights, setting_of_row, may_dim)
        dimmed = Routing(ids, weights)
        if kinds.intersection((*USES_UNITED, *USES_KEEP)):
            dimmed = self._replace(layer, dimmed, routing.probs, rows, setting_of_row, may_dim, kinds)
        is_own = (routing.ids[:, :, None] == dimmed.ids[:, None, :]).any(dim=2) | ~may_dim[:, None]
        return Dimmed(dimmed, (~is_own).sum(dim=1))

    def _replace(
        self,
        layer: int,
        routing: Routing,
        probs: Tensor | None,
        rows: RowInfo,
        setting_of_row: Tensor,
        may_dim: Tensor,
        kinds: set[DimmerKind],
    ) -> Routing:
        """Give pairs other experts: united, similar or active ones. Pairs that meet in one become one."""
        ids, weights = routing.ids, routing.weights
        use = self._use(layer, ids, weights, setting_of_row, may_dim, kinds)
        new_ids, new_weights = ids, weights
        if kinds.intersection((*USES_UNITED, DimmerKind.SIMILAR)):
            remap = self._remap(layer, use, rows.levels, kinds)  # [2, N + 1]
            new_ids = torch.where(may_dim[:, None], remap[rows.phase[:, None], ids], ids)
        if DimmerKind.PIGGYBACK in kinds:
            repicks = may_dim & (self.kind[setting_of_row] == PIGGYBACK)
            allowed = self._allowed(use, rows.levels)[rows.phase]  # [T, E]
            assert probs is not None
            new_ids, new_weights = self._repick(new_ids, weights, probs, allowed, repicks)
        return self._merge_duplicates(new_ids, new_weights)

    def _used(self, rows: RowInfo) -> tuple[set[DimmerKind], bool]:
        """Which dimmers the step may need, and whether any setting cuts; all of them where the host cannot know."""
        used = self._kinds if rows.host_levels is None else [self._kinds[level] for level in rows.host_levels]
        cuts = self._cuts if rows.host_levels is None else [self._cuts[level] for level in rows.host_levels]
        return set(used), any(cuts)

    def _cut(
        self, layer: int, ids: Tensor, weights: Tensor, setting_of_row: Tensor, may_dim: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leave each row its best top_k pairs, and protected ones; these take over the others' weight."""
        beyond = self._columns[: ids.shape[1]] >= self.top_k[setting_of_row, layer][:, None]
        dropped = beyond & may_dim[:, None] & ~self._of_experts(self.protected[layer], ids) & (ids < self.num_packed)
        left = torch.where(dropped, 0.0, weights.float())
        scale = weights.float().sum(1, keepdim=True) / left.sum(1, keepdim=True)
        left = (left * scale).to(weights.dtype)
        return torch.where(dropped, self.num_packed, ids), torch.where(dropped.any(1, keepdim=True), left, weights)

    def _use(
        self,
        layer: int,
        ids: Tensor,
        weights: Tensor,
        setting_of_row: Tensor,
        may_dim: Tensor,
        kinds: set[DimmerKind],
    ) -> _Use:
        of_pairs = [weights.float(), torch.ones_like(weights, dtype=torch.float32)]
        of_pairs.append((~may_dim)[:, None].expand_as(ids).float())
        if kinds.intersection(USES_KEEP):
            of_pairs.append(
                (may_dim[:, None] & (self._columns[: ids.shape[1]] < self.keep[setting_of_row][:, None])).float()
            )
        values = torch.stack(of_pairs).flatten(1)  # [3 or 4, T A]
        totals = torch.zeros(len(of_pairs), self.num_packed + 1, device=ids.device)
        totals = totals.scatter_add(1, ids.flatten().expand_as(values), values)[:, : len(self.identity)]
        used = totals[1] > 0
        return _Use(
            mass=totals[0],
            count=totals[1],
            used=used,
            staying=(totals[2] > 0) | (self.protected[layer] & used),
            kept=totals[3] > 0 if len(of_pairs) > 3 else None,
        )

    def _remap(self, layer: int, use: _Use, levels: Tensor, kinds: set[DimmerKind]) -> Tensor:
        """expert |-> packed id of what replaces it, for each phase: [2, N + 1]; "no expert" stays that.

        A phase at level 0 has no rows that may be dimmed, so what it would become does not matter.
        """
        dims = kinds - {DimmerKind.EXACT}
        kind = self.kind[levels][:, None]  # [2, 1]
        remap = self.identity.expand(2, -1)
        if dims.intersection(USES_UNITED):
            united = self._to_united(layer, use, levels, self._rank(use, kind, dims))
            alone = dims.issubset(USES_UNITED)
            remap = united if alone else torch.where((kind == UNITED) | (kind == PAPER), united, remap)
        if DimmerKind.SIMILAR in dims:
            remap = torch.where(kind == SIMILAR, self._to_similar(layer, use, levels), remap)
        return torch.cat([remap, self._beyond], dim=1)

    @staticmethod
    def _rank(use: _Use, kind: Tensor, dims: set[DimmerKind]) -> Tensor:
        """What an expert is hot by in each phase: [2, E]"""
        if DimmerKind.PAPER not in dims:
            return use.mass.expand(2, -1)
        return torch.where(kind == PAPER, use.count, use.mass)

    def _to_united(self, layer: int, use: _Use, levels: Tensor, rank: Tensor) -> Tensor:
        """[2, E]"""
        ranked, order = rank.sort(dim=1, descending=True, stable=True)
        above = torch.zeros_like(ranked).scatter(1, order, ranked.cumsum(1) - ranked)  # of the experts ranked higher
        is_cold = above >= (1 - self.share[levels])[:, None] * rank.sum(1, keepdim=True)
        cold = is_cold & (use.used & ~use.staying)
        united = self.united_of[layer, self.way_row[levels]]  # [2, E]
        num_cold = torch.zeros(2, self.num_packed, device=rank.device).scatter_add(1, united, cold.float())
        return torch.where(cold & (num_cold.gather(1, united) >= 2), united, self.identity)

    def _to_similar(self, layer: int, use: _Use, levels: Tensor) -> Tensor:
        """[2, E]"""
        assert self.similarity is not None
        assert use.kept is not None
        primary = use.kept | use.staying  # [E]
        similarity, nearest = self.similarity[layer].masked_fill(~primary, float("-inf")).max(dim=1)  # [E]
        moves = ~primary & (similarity >= self.min_similarity[levels][:, None])  # [2, E]
        return torch.where(moves, nearest, self.identity)

    def _allowed(self, use: _Use, levels: Tensor) -> Tensor:
        """The experts that piggybacking rows of each phase may use: [2, E] bool."""
        assert use.kept is not None
        needed = use.kept | use.staying
        order = torch.where(needed, float("inf"), use.mass).argsort(descending=True, stable=True)
        rank = torch.zeros_like(order).scatter(0, order, self.identity)
        return (needed | (rank < self.budget[levels][:, None])) & use.used

    def _repick(
        self, ids: Tensor, weights: Tensor, probs: Tensor, allowed: Tensor, repicks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As many experts as the row had, its own first, then the likeliest allowed ones; weights by probability."""
        own = torch.zeros(len(ids), self.num_packed + 1, device=ids.device)
        is_own = own.scatter_add(1, ids, torch.ones_like(weights, dtype=torch.float32))[:, : probs.shape[1]] > 0
        score = torch.where(allowed, probs + is_own.float(), -1.0)  # a probability is at most 1
        best, picked = score.topk(ids.shape[1], dim=1)
        num_pairs = (ids < self.num_packed).sum(1, keepdim=True)
        chosen = (best >= 0) & (self._columns[: ids.shape[1]] < num_pairs)
        shares = torch.where(chosen, probs.gather(1, picked), 0.0)
        mass = weights.float().sum(1, keepdim=True)
        rescaled = (shares * (mass / shares.sum(1, keepdim=True))).to(weights.dtype)
        leaves = (ids < self.num_packed) & ~self._of_experts(allowed, ids)
        changes = (repicks & leaves.any(dim=1))[:, None]
        return (
            torch.where(changes, torch.where(chosen, picked, self.num_packed), ids),
            torch.where(changes, rescaled, weights),
        )

    def _of_experts(self, values: Tensor, ids: Tensor) -> Tensor:
        """values [E] or [T, E] of each pair's expert [T, A]; anything for united experts and for none."""
        own = ids.clamp(max=len(self.identity) - 1)
        return values[own] if values.dim() == 1 else values.gather(1, own)

    def _merge_duplicates(self, ids: Tensor, weights: Tensor) -> Routing:
        """Pairs of a row with one id become its first pair with the summed weight; the others get no expert."""
        first = (ids[:, :, None] == ids[:, None, :]).to(torch.int8).argmax(dim=2)  # [T, A] column of the first equal id
        is_first = first == self._columns[: ids.shape[1]]
        summed = torch.zeros_like(weights).scatter_add(1, first, weights)
        return Routing(torch.where(is_first, ids, self.num_packed), summed)
