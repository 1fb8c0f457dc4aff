"""The ladder: brownout levels as data. Level 0 is exact; each further level costs more quality and less time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import BrownoutConfig, ConfigError

LADDER_FILE = "ladder.json"


@dataclass(frozen=True, slots=True)
class Level:
    """``way``: members per united expert (1: exact). ``share``: b, the routed mass that may go to united experts."""

    way: int = 1
    share: float = 0.0
    loss: float | None = None  # measured quality loss, nats per token; None: not measured

    @property
    def name(self) -> str:
        return "exact" if self.way == 1 else f"{self.way}-way b={self.share:g}"


@dataclass(frozen=True, slots=True)
class Ladder:
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels or self.levels[0].way != 1:
            raise ConfigError("brownout.ladder must start with the exact level (way 1)")
        for level in self.levels[1:]:
            if not (level.way > 1 and 0 < level.share <= 1):
                raise ConfigError(
                    f"brownout.ladder has way {level.way}, share {level.share}; allowed: way > 1, share in (0, 1]"
                )
        losses = [level.loss for level in self.levels]
        if self.measured and losses != sorted(losses, key=lambda loss: loss or 0.0):
            raise ConfigError(f"brownout.ladder losses are {losses}; allowed: ascending")

    @staticmethod
    def exact() -> Ladder:
        """Of a model that cannot dim."""
        return Ladder((Level(),))

    @property
    def measured(self) -> bool:
        return all(level.loss is not None for level in self.levels[1:])

    def __len__(self) -> int:
        return len(self.levels)


# Ordered by the distinct experts that a full batch leaves of 60 under even routing; quality losses are not known.
UNMEASURED_LEVELS = (Level(2, 0.5), Level(2, 1.0), Level(4, 0.85), Level(4, 1.0), Level(8, 0.9), Level(8, 1.0))


def load_ladder(config: BrownoutConfig, ways: tuple[int, ...], model_directory: Path) -> Ladder:
    """The configured ladder, else ladder.json beside the model, else the unmeasured default for the loaded ways."""
    path = Path(config.ladder) if config.ladder else model_directory / LADDER_FILE
    if path.exists():
        ladder = _read(path)
        missing = {level.way for level in ladder.levels[1:]} - set(ways)
        if missing:
            raise ConfigError(f"brownout.ways is {list(ways)}; the ladder {path} also needs {sorted(missing)}")
        return ladder
    if config.ladder:
        raise ConfigError(f"brownout.ladder is {config.ladder!r}, which does not exist; allowed: a ladder JSON")
    return Ladder((Level(loss=0.0), *(level for level in UNMEASURED_LEVELS if level.way in ways)))


def _read(path: Path) -> Ladder:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["levels"]
        return Ladder(tuple(Level(int(r["way"]), float(r["share"]), r.get("loss")) for r in rows))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"brownout.ladder {path} cannot be read: {error!r}") from error
