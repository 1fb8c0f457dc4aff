"""The plant: how long a step really takes, from measured profiles. What the governor believes is another matter.

A step of n tokens takes, at level l,

    overhead + T0(n) - saving_l(n) * dimmable + kv_s * (context tokens - those of the measurement)

T0 is piecewise linear through the measured decode steps and, beyond them, the measured prefill rate. saving_l is the
measured difference to level 0; beyond the largest decode step it fades by ``united_fade``: a long prefill reads
every weight anyhow. ``prefill_frac`` is what the level leaves of a prefill token's own compute (fewer experts each).
``dimmable`` is the share of the experts that no row of class ``full`` keeps active, under even routing.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.simulator.scenario import LevelSection, PlantSection, SimulationError

NUM_EXPERTS, EXPERTS_PER_TOKEN = 60, 4  # Qwen1.5-MoE-A2.7B, the profiled model
NUM_LAYERS = 24


@dataclass(frozen=True, slots=True)
class Curve:
    """Piecewise linear; beyond its ends the nearest segment is continued."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def at(self, x: float) -> float:
        if len(self.xs) == 1:
            return self.ys[0]
        i = min(max(bisect_right(self.xs, x) - 1, 0), len(self.xs) - 2)
        return self.ys[i] + (self.ys[i + 1] - self.ys[i]) * (x - self.xs[i]) / (self.xs[i + 1] - self.xs[i])


@dataclass(frozen=True, slots=True)
class Load:
    """What one step computes. Exact rows belong to requests of class ``full``."""

    num_decodes: int = 0
    num_prefill_tokens: int = 0
    num_exact: int = 0  # tokens of exact rows, of both phases
    context_tokens: int = 0  # KV that decode rows read

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_prefill_tokens


class Plant:
    """Step times of one kind of replica; ``speed`` scales them all (1: as measured)."""

    def __init__(self, section: PlantSection, speed: float = 1.0) -> None:
        self._section = section
        self._speed = speed
        self._level0, self._levels, self._kv_s, self._measured_context = _read_profile(section)
        self._num_measured = self._levels[0].xs[-1]
        self._fade = Curve(tuple(map(float, section.united_fade)), tuple(section.united_fade.values()))
        self._prefill_token_s = (self._level0.ys[-1] - self._level0.ys[-2]) / (
            self._level0.xs[-1] - self._level0.xs[-2]
        )

    @property
    def num_levels(self) -> int:
        return len(self._levels)

    def step_s(self, load: Load, prefill_level: int, decode_level: int) -> float:
        """Seconds of one step whose phases run at the given levels."""
        num_tokens = load.num_tokens
        saving_s = self._saved_s(decode_level, num_tokens) * load.num_decodes
        saving_s += self._saved_s(prefill_level, num_tokens) * load.num_prefill_tokens
        dimmable = (1 - EXPERTS_PER_TOKEN / NUM_EXPERTS) ** load.num_exact
        saved_s = dimmable * saving_s / num_tokens
        dimmed_prompt = load.num_prefill_tokens * max(0.0, 1 - load.num_exact / num_tokens)
        fewer = 1 - self._section.levels[prefill_level].prefill_frac
        saved_s += fewer * dimmed_prompt * self._prefill_token_s
        extra_context = max(0.0, load.context_tokens - load.num_decodes * self._measured_context)
        kv_s = self._section.kv_error * self._kv_s * extra_context
        step_s = self._level0.at(num_tokens) - self._section.saving_error * saved_s + kv_s
        return (self._section.overhead_s + step_s) / self._speed

    def _saved_s(self, level: int, num_tokens: int) -> float:
        within = min(num_tokens, self._num_measured)
        saved_s = max(0.0, self._levels[0].at(within) - self._levels[level].at(within))
        return saved_s * (self._fade.at(num_tokens) if num_tokens > self._num_measured else 1.0)


def _read_profile(section: PlantSection) -> tuple[Curve, list[Curve], float, float]:
    """(level 0 with prefill, decode curve of each level, seconds per context token, context of the measurement)."""
    figures = json.loads(Path(section.profile_path).read_text())
    if "profile" in figures:
        return _read_engine_profile(figures["profile"])
    tables = figures["decode_step_ms"]
    sizes = tuple(float(n) for n in tables["level0"])
    levels = [
        Curve(sizes, tuple(_mixed_ms(tables, level, str(int(n))) / 1e3 for n in sizes)) for level in section.levels
    ]
    prompt_tokens, prefill_tok_s = section.prefill_point(figures["prefill_tok_s"])
    level0 = Curve((*sizes, prompt_tokens), (*levels[0].ys, prompt_tokens / prefill_tok_s))
    short, long = figures["attention_ms"]["64x160"], figures["attention_ms"]["64x1056"]
    kv_s = (min(long.values()) - min(short.values())) / (64 * (1056 - 160)) / 1e3 * NUM_LAYERS
    return level0, levels, kv_s, 160.0


def _read_engine_profile(profile: dict[str, Sequence]) -> tuple[Curve, list[Curve], float, float]:
    """The profile that an engine measures at start: ``token_counts`` and ``times_s`` by level, no context term."""
    sizes = tuple(float(n) for n in profile["token_counts"])
    levels = [Curve(sizes, tuple(times)) for times in profile["times_s"]]
    return levels[0], levels, 0.0, float("inf")


def _mixed_ms(tables: dict[str, dict[str, float]], level: LevelSection, size: str) -> float:
    """A level that was not measured lies between two that were: step time is linear in the experts that stay active."""
    try:
        first, second = tables[level.profile], tables[level.toward or level.profile]
    except KeyError as error:
        raise SimulationError(
            f"level {level.name!r}: the profile has no table {error}; it has {', '.join(tables)}"
        ) from None
    return first[size] + level.share * (second[size] - first[size])
