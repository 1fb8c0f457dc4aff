"""Verdicts on the testable claims that quality rows can decide: holds, fails, or not resolved. Pure.

| claim | says                                                                                        |
| ----- | ------------------------------------------------------------------------------------------- |
| C1    | routed distillation loses at most 60 % of the mixture-target build's dNLL (4-way, b = 1)    |
| C2    | the instant build loses at most twice what the distilled one does, and takes under 60 s     |
| C4    | 2-way at b = 1 beats 4-way at equal distinct experts, batch 128                             |
| C5    | piggyback beats united experts at small batches and loses at large ones, with one crossover |
| C6    | a hot set by gate mass loses at least 5 % less than by token count, at equal experts, and   |
|       | one by token count loses less than one drawn at random                                      |
| C13   | level 0 is exact: no loss at all when measured like every other row                         |
| C14   | the grouping changes dNLL by less than 10 % once distilled on routed inputs                 |

A comparison is resolved if its sides differ from the limit by more than two standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

HOLDS, FAILS, NOT_RESOLVED = "holds", "fails", "not resolved"
Row = Mapping[str, Any]


def judge(rows: Sequence[Row], builds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Claim |-> verdict and the figures that it rests on."""
    verdicts = {
        "C1": _routed_against_mixture(rows),
        "C2": _instant(rows, builds),
        "C4": _finer_way(rows),
        "C5": _crossover(rows),
        "C6": _mass_against_count(rows),
        "C13": _level_zero(rows),
        "C14": _grouping(rows),
    }
    return {name: {"verdict": verdict, "figures": figures} for name, (verdict, figures) in verdicts.items()}


Verdict = tuple[str, dict[str, Any]]


def _ratio(over: Row, under: Row) -> tuple[float, float]:
    """over / under of two rows' dNLL, and its standard error as if the rows were independent, which is cautious.

    Nothing has a ratio to a loss that is not resolved itself: then the error is infinite.
    """
    if under["dnll"] <= 2 * under["se"]:
        return 1.0, math.inf
    ratio = over["dnll"] / under["dnll"]
    return ratio, math.hypot(over["se"], ratio * under["se"]) / under["dnll"]


def _as_figures(name: str, ratio: float, error: float) -> dict[str, float | None]:
    known = math.isfinite(error)
    return {name: round(ratio, 3) if known else None, "se": round(error, 3) if known else None}


def _below(value: float, error: float, limit: float) -> str:
    if value + 2 * error <= limit:
        return HOLDS
    return FAILS if value - 2 * error > limit else NOT_RESOLVED


def _find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def _whole_4_way(rows: Sequence[Row], build: str) -> Row | None:
    """All pairs of a batch of 128 dimmed to 4-way united experts of ``build``."""
    found = [row for row in rows if row["build"] == build and row["dimmer"] == "united" and row["batch"] == 128]
    return next((row for row in found if row["way"] == 4 and row["param"]["share"] == 1.0), None)


def _missing(what: str) -> Verdict:
    return NOT_RESOLVED, {"reason": f"no rows of {what}"}


def _routed_against_mixture(rows: Sequence[Row]) -> Verdict:
    routed, mixture = _whole_4_way(rows, "routed"), _whole_4_way(rows, "mixture")
    average = _whole_4_way(rows, "average")
    if routed is None or mixture is None:
        return _missing("the routed and the mixture build")
    ratio, error = _ratio(routed, mixture)
    figures = {"routed": routed["dnll"], "mixture": mixture["dnll"], **_as_figures("ratio", ratio, error)}
    if average is not None:
        figures["average"] = average["dnll"]
    return _below(ratio, error, 0.6), figures


def _instant(rows: Sequence[Row], builds: Sequence[Mapping[str, Any]]) -> Verdict:
    routed, instant = _whole_4_way(rows, "routed"), _whole_4_way(rows, "instant")
    build = _find(builds, name="instant-4")
    if routed is None or instant is None or build is None:
        return _missing("the routed and the instant build")
    ratio, error = _ratio(instant, routed)
    figures = {**_as_figures("ratio", ratio, error), "seconds": build["seconds"]}
    verdict = _below(ratio, error, 2.0)
    return (FAILS if build["seconds"] >= 60 else verdict), figures


def front(rows: Sequence[Row], experts: float) -> tuple[float, float] | None:
    """dNLL and standard error at a number of distinct experts, linear between measured rows; None outside them."""
    points = sorted((row["experts"], row["dnll"], row["se"]) for row in rows)
    for (low, low_dnll, low_se), (high, high_dnll, high_se) in pairwise(points):
        if low <= experts <= high and high > low:
            part = (experts - low) / (high - low)
            return low_dnll + part * (high_dnll - low_dnll), max(low_se, high_se)
    return None


def _finer_way(rows: Sequence[Row]) -> Verdict:
    routed = [row for row in rows if row["build"] == "routed" and row["dimmer"] == "united" and row["batch"] == 128]
    two = next((row for row in routed if row["way"] == 2 and row["param"]["share"] == 1.0), None)
    exact = [row for row in rows if row["dimmer"] == "exact" and row["batch"] == 128]
    if two is None:
        return _missing("2-way united experts at batch 128")
    four = front([*(row for row in routed if row["way"] == 4), *exact], two["experts"])
    if four is None:
        return _missing("4-way united experts around the same number of experts")
    difference, error = two["dnll"] - four[0], math.hypot(two["se"], four[1])
    figures = {
        "experts": two["experts"], "2-way": two["dnll"], "4-way": round(four[0], 5), "se": round(error, 5),
    }  # fmt: skip
    return _below(difference, error, 0.0), figures


def _crossover(rows: Sequence[Row]) -> Verdict:
    """At each batch, the mean difference of the two fronts over the experts that both can reach."""
    sizes = sorted({row["batch"] for row in rows if isinstance(row["batch"], int)})
    differences: dict[int, tuple[float, float]] = {}
    for size in sizes:
        at = [row for row in rows if row["batch"] == size]
        exact = [row for row in at if row["dimmer"] == "exact"]
        piggyback = [row for row in at if row["dimmer"] == "piggyback"]
        united = [row for row in at if row["dimmer"] == "united" and row["build"] == "routed" and row["way"] in (2, 4)]
        found = _mean_difference(piggyback, [*_lower_front(united), *exact])
        if found is not None:
            differences[size] = found
    figures = {
        str(size): {"piggyback_minus_united": round(value, 5), "se": round(error, 5)}
        for size, (value, error) in differences.items()
    }
    signs = [0 if abs(value) <= 2 * error else math.copysign(1, value) for value, error in differences.values()]
    if len(signs) < 2 or not any(signs):
        return NOT_RESOLVED, figures
    resolved = [sign for sign in signs if sign]
    changes = sum(a != b for a, b in pairwise(resolved))
    if resolved[0] < 0 < resolved[-1] and changes == 1:
        return HOLDS, figures
    return (NOT_RESOLVED if 0 in (signs[0], signs[-1]) else FAILS), figures


def _lower_front(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other row beats in both experts and dNLL."""
    return [
        row
        for row in rows
        if not any(
            other["experts"] <= row["experts"] and other["dnll"] < row["dnll"] for other in rows if other is not row
        )
    ]


def _mean_difference(rows: Sequence[Row], others: Sequence[Row]) -> tuple[float, float] | None:
    """Mean of dNLL minus the other front's dNLL at the same experts, over the rows within its range."""
    found = [(row, other) for row in rows if (other := front(others, row["experts"])) is not None]
    if not found:
        return None
    value = sum(row["dnll"] - other[0] for row, other in found) / len(found)
    # The rows share their text: their errors are taken as fully correlated.
    return value, sum(math.hypot(row["se"], other[1]) for row, other in found) / len(found)


def _mass_against_count(rows: Sequence[Row]) -> Verdict:
    figures, verdicts = {}, []
    for size in sorted({row["batch"] for row in rows if isinstance(row["batch"], int)}):
        at = [row for row in rows if row["batch"] == size and row["build"] == "routed" and row["way"] == 4]
        by_count = [row for row in at if row["dimmer"] == "paper"]
        by_mass = [row for row in at if row["dimmer"] == "united"]
        at_random = [row for row in at if row["dimmer"] == "random mask"]
        less_than_all = [row for row in by_count if row["param"]["share"] < 1.0]
        for name, better, worse, limit in (
            ("mass_over_count", by_mass, less_than_all, 0.95),
            ("count_over_random", by_count, at_random, 1.0),
        ):
            found = _mean_ratio(better, worse)
            if found is not None:
                ratio, error = found
                figures[f"{name} at {size}"] = {"ratio": round(ratio, 3), "se": round(error, 3)}
                verdicts.append(_below(ratio, error, limit))
    if not verdicts:
        return _missing("hot sets by mass, by count and at random")
    return _all(verdicts), figures


def _all(verdicts: Sequence[str]) -> str:
    """A claim of several parts fails with one of them."""
    if FAILS in verdicts:
        return FAILS
    return NOT_RESOLVED if NOT_RESOLVED in verdicts else HOLDS


def _mean_ratio(better: Sequence[Row], worse: Sequence[Row]) -> tuple[float, float] | None:
    """Mean of a front's dNLL over that of rows beside it, at the rows' experts; their errors count as correlated."""
    ratios = []
    for row in worse:
        other = front(better, row["experts"])
        if other is not None and row["dnll"] > 0:
            ratios.append((other[0] / row["dnll"], math.hypot(row["se"], other[1]) / row["dnll"]))
    if not ratios:
        return None
    return sum(ratio for ratio, _ in ratios) / len(ratios), sum(error for _, error in ratios) / len(ratios)


def _level_zero(rows: Sequence[Row]) -> Verdict:
    exact = [row for row in rows if row["dimmer"] == "exact" and row["batch"] == 128]
    if not exact:
        return _missing("level 0")
    figures = {
        "dnll": exact[0]["dnll"], "kl": exact[0]["kl"],
        "note": "bit-identity and the prefix cache's rule are unit tests (tests/unit/engine)",
    }  # fmt: skip
    return (HOLDS if exact[0]["dnll"] == 0 and exact[0]["kl"] == 0 else FAILS), figures


def _grouping(rows: Sequence[Row]) -> Verdict:
    found = {name: _whole_4_way(rows, f"routed-4-{name}") for name in ("consecutive", "apart", "similar")}
    present = {name: row for name, row in found.items() if row is not None}
    if len(present) < 2:
        return _missing("builds by different groupings")
    best, worst = (choose(present.values(), key=lambda row: row["dnll"]) for choose in (min, max))
    ratio, error = _ratio(worst, best)
    figures: dict[str, Any] = {name: row["dnll"] for name, row in present.items()}
    figures |= _as_figures("worst_over_best", ratio, error)
    return _below(ratio, error, 1.1), figures
