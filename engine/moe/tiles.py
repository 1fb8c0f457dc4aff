"""Tile shapes of the grouped matrix products, by number of tokens. Tuned per card (engine.moe.tune), else defaults.

A tuned table is a JSON file in ``tuned/``, named after the card and the expert's shape. The choice depends on the
number of tokens only, never on the routing: a level must not change what the exact experts compute.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True, slots=True)
class Tile:
    """``columns`` of the result by ``depth`` of the product, in numbers of two bytes, per step of the inner loop."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int
    bulk_copy: bool = False  # weights through Hopper's tensor memory accelerator; only a tuned table may say so


@dataclass(frozen=True, slots=True)
class MoeTiles:
    """How the two grouped products of one MoE layer are cut."""

    rows: int  # pairs of one expert per tile
    gate_up: Tile
    down: Tile


@dataclass(frozen=True, slots=True)
class TileTable:
    """``tiles[i]`` serves steps of at most ``token_counts[i]`` tokens (ascending); the last also larger ones."""

    token_counts: tuple[int, ...]
    tiles: tuple[MoeTiles, ...]

    def of(self, num_tokens: int) -> MoeTiles:
        return self.tiles[min(bisect_left(self.token_counts, num_tokens), len(self.tiles) - 1)]

    def save(self, path: Path) -> None:
        rows = {str(count): asdict(tiles) for count, tiles in zip(self.token_counts, self.tiles, strict=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> TileTable:
        rows = {int(count): row for count, row in json.loads(path.read_text()).items()}
        counts = tuple(sorted(rows))
        return TileTable(
            counts,
            tuple(MoeTiles(rows[n]["rows"], Tile(**rows[n]["gate_up"]), Tile(**rows[n]["down"])) for n in counts),
        )


SMALL = MoeTiles(16, Tile(64, 128, 4, 4), Tile(64, 128, 4, 4))
MEDIUM = MoeTiles(32, Tile(64, 128, 4, 3), Tile(64, 128, 4, 4))
LARGE = MoeTiles(64, Tile(64, 64, 4, 3), Tile(128, 64, 4, 3))
DEFAULTS = TileTable((128, 512, 1024), (SMALL, MEDIUM, LARGE))


def tuned_path(card: str, num_experts: int, hidden_size: int, expert_size: int) -> Path:
    return TUNED / f"{card.replace(' ', '_')}-E{num_experts}-D{hidden_size}-F{expert_size}-bfloat16.json"


def tile_table(card: str, num_experts: int, hidden_size: int, expert_size: int) -> TileTable:
    """The tuned table of this card and shape, else the defaults; logs which."""
    path = tuned_path(card, num_experts, hidden_size, expert_size)
    if path.exists():
        logger.info("expert tiles: tuned for %s", card)
        return TileTable.load(path)
    logger.warning("expert tiles: defaults, not tuned for %s; python -m engine.moe.tune writes %s", card, path)
    return DEFAULTS
