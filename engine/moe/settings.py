"""What a dimmer can be told: one setting is one way to dim, data for the device. Pure.

| dimmer    | what its rows do                                                | stronger with            |
| --------- | --------------------------------------------------------------- | ------------------------ |
| exact     | keep their experts                                              |                          |
| united    | experts outside the step's hot mass go to the ``way``'s united  | larger ``share``         |
| paper     | the same, ranked by token count (arXiv 2507.17133)              | larger ``share``         |
| piggyback | keep their top ``keep``, re-pick the rest among active experts  | smaller keep, ``budget`` |
| similar   | all but any row's top ``keep`` go to the most similar of these  | smaller min_similarity   |
| topk      | keep fewer experts                                              | smaller ``top_k``        |

``top_k`` composes with every other dimmer: it acts first. Sources: piggyback is OEA (arXiv 2511.02237) with XShare's
budget (arXiv 2602.07265); similar is SERE (arXiv 2602.07616), a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

from engine.config import ConfigError


class DimmerKind(IntEnum):
    """As numbers in the device's tables."""

    EXACT = 0
    UNITED = 1
    PAPER = 2
    PIGGYBACK = 3
    SIMILAR = 4
    TOPK = 5


USES_UNITED = (DimmerKind.UNITED, DimmerKind.PAPER)
USES_KEEP = (DimmerKind.PIGGYBACK, DimmerKind.SIMILAR)


@dataclass(frozen=True, slots=True)
class DimSetting:
    """One dimmer with its parameters; what the dimmer does not read keeps its default."""

    kind: DimmerKind = DimmerKind.EXACT
    way: int = 1  # members per united expert
    share: float = 0.0  # b: routed mass (paper: tokens) that may leave its experts
    keep: int = 0  # experts per row that every row keeps
    budget: int = 0  # experts that stay active, if the rows' kept ones are fewer
    min_similarity: float = 0.0
    top_k: tuple[int, ...] = ()  # experts per token, one for all layers or one for each; (): all

    def __post_init__(self) -> None:
        if self.kind in USES_UNITED and not (self.way > 1 and 0 < self.share <= 1):
            raise ConfigError(
                f"a {self.name} level has way {self.way}, share {self.share}; allowed: way > 1, share in (0, 1]"
            )
        if self.kind in (DimmerKind.PIGGYBACK, DimmerKind.SIMILAR) and self.keep < 1:
            raise ConfigError(f"a {self.name} level has keep {self.keep}; allowed: 1 or more")
        if self.kind is DimmerKind.TOPK and not self.top_k:
            raise ConfigError("a topk level has no top_k; allowed: experts per token, for all layers or for each")
        if self.exact and (self.way > 1 or self.share or self.keep or self.budget or self.top_k):
            raise ConfigError("an exact level has parameters; allowed: none")
        if any(k < 1 for k in self.top_k):
            raise ConfigError(f"a level has top_k {list(self.top_k)}; allowed: 1 or more")

    @property
    def exact(self) -> bool:
        return self.kind is DimmerKind.EXACT

    @property
    def name(self) -> str:
        match self.kind:
            case DimmerKind.UNITED:
                name = f"{self.way}-way b={self.share:g}"
            case DimmerKind.PAPER:
                name = f"paper {self.way}-way p={1 - self.share:g}"
            case DimmerKind.PIGGYBACK:
                name = f"piggyback k0={self.keep}" + (f" M={self.budget}" if self.budget else "")
            case DimmerKind.SIMILAR:
                name = f"similar S={self.keep} rho={self.min_similarity:g}"
            case DimmerKind.TOPK:
                return f"top-{self._mean_top_k:g}"
            case _:
                name = "exact"
        return f"{name} top-{self._mean_top_k:g}" if self.top_k else name

    @property
    def _mean_top_k(self) -> float:
        return round(sum(self.top_k) / len(self.top_k), 2)

    def with_top_k(self, top_k: tuple[int, ...]) -> DimSetting:
        """The same setting over fewer experts per token."""
        return replace(self, top_k=top_k)

    def check(self, num_layers: int, num_experts: int, num_experts_per_token: int) -> None:
        """Raises ConfigError for what the model does not have."""
        if len(self.top_k) not in (0, 1, num_layers) or any(k > num_experts_per_token for k in self.top_k):
            raise ConfigError(
                f"level {self.name} has top_k {list(self.top_k)}; allowed: 1 to {num_experts_per_token}, once or for "
                f"each of {num_layers} layers"
            )
        if self.keep > num_experts_per_token or self.budget > num_experts:
            raise ConfigError(
                f"level {self.name} has keep {self.keep}, budget {self.budget}; allowed: at most "
                f"{num_experts_per_token} and {num_experts}"
            )

    def to_json(self) -> dict[str, Any]:
        """The dimmer and those parameters that differ from the defaults."""
        default = DimSetting()
        content: dict[str, Any] = {"dimmer": self.kind.name.lower()}
        for name in ("way", "share", "keep", "budget", "min_similarity"):
            if getattr(self, name) != getattr(default, name):
                content[name] = getattr(self, name)
        if self.top_k:
            content["top_k"] = list(self.top_k)
        return content

    @staticmethod
    def from_json(content: dict[str, Any]) -> DimSetting:
        """Without a dimmer it is united, or exact at way 1. Raises ConfigError, KeyError, TypeError or ValueError."""
        name = content["dimmer"] if "dimmer" in content else "exact" if content["way"] == 1 else "united"
        try:
            kind = DimmerKind[str(name).upper()]
        except KeyError as error:
            allowed = ", ".join(kind.name.lower() for kind in DimmerKind)
            raise ConfigError(f"a level has dimmer {name!r}; allowed: {allowed}") from error
        top_k = content.get("top_k", ())
        return DimSetting(
            kind,
            way=int(content.get("way", 1)),
            share=float(content.get("share", 0.0)),
            keep=int(content.get("keep", 0)),
            budget=int(content.get("budget", 0)),
            min_similarity=float(content.get("min_similarity", 0.0)),
            top_k=(int(top_k),) if isinstance(top_k, int) else tuple(int(k) for k in top_k),
        )
