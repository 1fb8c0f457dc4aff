"""The ladder: what each brownout level means, by phase and step size. Pure but for reading its file.

A level is a budget of quality loss. In each (phase, step size) it names the setting that takes the least time within
it, so one number orders all dimmers, and the governor needs to know nothing of them. Level 0 is exact; each further
level loses more and takes less time. A step's size is its number of tokens, whichever phase they belong to: that
decides how many experts are active; a row's setting is that of its own phase.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.config import ConfigError
from engine.moe.settings import USES_UNITED, DimmerKind, DimSetting
from engine.types import Levels, Phase

FORMAT = "brownoutserve-ladder-1"
LADDER_FILE = "ladder.json"


@dataclass(frozen=True, slots=True)
class Level:
    """A setting with what it was measured to cost and to save; None: not measured."""

    setting: DimSetting = field(default_factory=DimSetting)
    loss: float | None = None  # quality loss, nats per token
    step_frac: float | None = None  # step time relative to level 0

    @property
    def name(self) -> str:
        return self.setting.name


@dataclass(frozen=True, slots=True)
class Bucket:
    """The levels of one phase in steps of at most ``max_tokens`` tokens; None: of any size."""

    phase: Phase
    max_tokens: int | None
    levels: tuple[Level, ...]

    @property
    def name(self) -> str:
        size = "any size" if self.max_tokens is None else f"up to {self.max_tokens} tokens"
        return f"{self.phase.name.lower()}, {size}"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a measured ladder belongs to."""

    model_digest: str
    united: Mapping[int, str] = field(default_factory=dict)  # way |-> digest of the build it was measured with
    calibration: Mapping[str, Any] = field(default_factory=dict)  # text, tokens, device, versions, command


@dataclass(frozen=True)
class Ladder:
    """Buckets of each phase in ascending size, the last of each without limit; all have the same number of levels."""

    buckets: tuple[Bucket, ...]
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        for phase in Phase:
            sizes = [bucket.max_tokens for bucket in self._of(phase)]
            limits = [size for size in sizes if size is not None]
            if sizes != [*sorted(set(limits)), None]:
                raise ConfigError(
                    f"brownout.ladder has sizes {sizes} for {phase.name.lower()}; allowed: ascending, the last null"
                )
        counts = {len(bucket.levels) for bucket in self.buckets}
        if len(counts) > 1:
            raise ConfigError(f"brownout.ladder has {sorted(counts)} levels; allowed: as many in every bucket")
        for bucket in self.buckets:
            _check_levels(bucket)

    @staticmethod
    def uniform(levels: Sequence[Level]) -> Ladder:
        """The same levels for both phases and all sizes."""
        return Ladder(tuple(Bucket(phase, None, tuple(levels)) for phase in Phase))

    @staticmethod
    def exact() -> Ladder:
        """Of a model that cannot dim."""
        return Ladder.uniform([Level()])

    def __len__(self) -> int:
        return len(self.buckets[0].levels)

    @property
    def measured(self) -> bool:
        return all(level.loss is not None for bucket in self.buckets for level in bucket.levels[1:])

    def without_losses(self) -> Ladder:
        """The same settings as guesses, when what they were measured with is not what is loaded."""
        buckets = tuple(replace(b, levels=tuple(replace(x, loss=None) for x in b.levels)) for b in self.buckets)
        return replace(self, buckets=buckets)

    @property
    def losses(self) -> tuple[float, ...]:
        """Of each level, in whichever bucket it is largest; () if it is not measured."""
        if not self.measured:
            return ()
        return tuple(max(b.levels[index].loss or 0.0 for b in self.buckets) for index in range(len(self)))

    @property
    def names(self) -> tuple[str, ...]:
        """Of each level, for people: its settings over all buckets."""
        return tuple(
            " | ".join(dict.fromkeys(bucket.levels[index].name for bucket in self.buckets))
            for index in range(len(self))
        )

    @cached_property
    def settings(self) -> tuple[DimSetting, ...]:
        """All distinct settings, the exact one first; what :meth:`resolve` points into."""
        found = [level.setting for bucket in self.buckets for level in bucket.levels]
        return tuple(dict.fromkeys([DimSetting(), *found]))

    @property
    def ways(self) -> frozenset[int]:
        """Of the united experts that its settings need."""
        return frozenset(setting.way for setting in self.settings if setting.kind in USES_UNITED)

    def at(self, phase: Phase, num_tokens: int) -> Bucket:
        """The bucket of a step of ``num_tokens`` tokens."""
        return next(b for b in self._of(phase) if b.max_tokens is None or num_tokens <= b.max_tokens)

    def resolve(self, levels: Levels, num_tokens: int) -> Levels:
        """The step's setting in each phase, as index into :attr:`settings`, in place of the levels."""
        return Levels(
            self._setting_id(Phase.PREFILL, levels.prefill, num_tokens),
            self._setting_id(Phase.DECODE, levels.decode, num_tokens),
        )

    def _setting_id(self, phase: Phase, level: int, num_tokens: int) -> int:
        if level == 0:
            return 0
        return self._ids[self.at(phase, num_tokens).levels[level].setting]

    @cached_property
    def _ids(self) -> dict[DimSetting, int]:
        return {setting: index for index, setting in enumerate(self.settings)}

    def _of(self, phase: Phase) -> list[Bucket]:
        return [bucket for bucket in self.buckets if bucket.phase is phase]

    def write(self, path: Path) -> None:
        content = {
            "format": FORMAT,
            "provenance": asdict(self.provenance) if self.provenance else None,
            "buckets": [
                {
                    "phase": bucket.phase.name.lower(),
                    "max_tokens": bucket.max_tokens,
                    "levels": [
                        level.setting.to_json() | {"loss": level.loss, "step_frac": level.step_frac}
                        for level in bucket.levels
                    ],
                }
                for bucket in self.buckets
            ],
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)


def read_ladder(path: Path) -> Ladder:
    """Raises ConfigError. ``{"levels": [...]}`` alone is a ladder for both phases and all sizes, without provenance."""
    try:
        content = json.loads(path.read_text())
        if "buckets" not in content:
            return Ladder.uniform([_level(row) for row in content["levels"]])
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}; allowed: {FORMAT!r}")
        buckets = tuple(
            Bucket(Phase[row["phase"].upper()], row["max_tokens"], tuple(_level(level) for level in row["levels"]))
            for row in content["buckets"]
        )
        origin = content["provenance"]
        provenance = origin and Provenance(
            str(origin["model_digest"]),
            {int(way): str(digest) for way, digest in origin["united"].items()},
            origin["calibration"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"brownout.ladder {path} cannot be read: {error!r}") from error
    return Ladder(buckets, provenance or None)


def _level(row: Mapping[str, Any]) -> Level:
    loss, step_frac = row.get("loss"), row.get("step_frac")
    return Level(
        DimSetting.from_json(dict(row)),
        None if loss is None else float(loss),
        None if step_frac is None else float(step_frac),
    )


def _check_levels(bucket: Bucket) -> None:
    if not bucket.levels or not bucket.levels[0].setting.exact:
        raise ConfigError(f"brownout.ladder must start with the exact level ({bucket.name})")
    losses = [level.loss for level in bucket.levels[1:]]
    if None not in losses and any(a > b for a, b in pairwise(loss or 0.0 for loss in losses)):
        raise ConfigError(f"brownout.ladder losses are {losses} ({bucket.name}); allowed: ascending")


def default_ladder(kind: DimmerKind, ways: Sequence[int], num_experts_per_token: int) -> Ladder:
    """Of a model without a measured one. United levels are ordered by the distinct experts that a full batch leaves."""
    fewer = range(num_experts_per_token - 1, 0, -1)
    if kind in USES_UNITED:
        settings = [DimSetting(kind, way, share) for way, share in UNMEASURED_UNITED if way in ways]
    elif kind is DimmerKind.TOPK:
        settings = [DimSetting(kind, top_k=(k,)) for k in fewer]
    else:
        settings = [DimSetting(kind, keep=k) for k in fewer]
    return Ladder.uniform([Level(loss=0.0), *map(Level, settings)])


UNMEASURED_UNITED = ((2, 0.5), (2, 1.0), (4, 0.85), (4, 1.0), (8, 0.9), (8, 1.0))  # (way, share)
