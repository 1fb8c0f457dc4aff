"""What `brownoutserve explain` tells: requests joined with the decisions that were in force. Pure.

Requests and decisions are joined by setting version, never by time: replicas and controller keep their own clocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class TimeRange:
    """[since_s, until_s), Unix time."""

    since_s: float
    until_s: float


def parse_range(text: str, now: datetime) -> TimeRange | None:
    """The last "10m"; or "A..B" or "A..", each of A and B a time ago, HH:MM[:SS] of today or an ISO time; else None."""
    if ago_s := _duration_s(text):
        return TimeRange(now.timestamp() - ago_s, now.timestamp())
    first, dots, last = text.partition("..")
    if not dots:
        return None
    since_s, until_s = _moment_s(first, now), _moment_s(last, now) if last else now.timestamp()
    return None if since_s is None or until_s is None else TimeRange(since_s, until_s)


def _moment_s(text: str, now: datetime) -> float | None:
    if (ago_s := _duration_s(text)) is not None:
        return now.timestamp() - ago_s
    try:
        if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
            hour, minute, *second = (int(part) for part in text.split(":"))
            return now.replace(hour=hour, minute=minute, second=second[0] if second else 0, microsecond=0).timestamp()
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _duration_s(text: str) -> float | None:
    match = DURATION.fullmatch(text)
    return float(match[1]) * UNIT_S[match[2]] if match else None


def request_sentences(request: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> list[str]:
    """One request in plain words. ``decisions``: the settings in force while it ran, any order."""
    in_force = [row["decision"] for row in decisions if row["kind"] == "setting"]
    ttft_slo_s = in_force[0]["prefill"]["budget_s"] if in_force else None
    tpot_slo_s = in_force[0]["decode"]["budget_s"] if in_force else None
    when = datetime.fromtimestamp(request["ended_at_s"]).strftime("%Y-%m-%d %H:%M:%S")
    sentences = [
        f"class {request['service_class']}, model {request['model_id']}, replica {request['replica_id']}",
        f"ended {when} by the replica's clock: {request['finish_reason']}, after {request['duration_s']:.2f} s",
    ]
    if request["ttft_s"] is None:
        sentences.append("it never got a token")
    else:
        waited_s = request["queue_wait_s"] or 0.0
        sentences.append(
            f"first token after {request['ttft_s']:.3f} s{_kept(request['ttft_s'], ttft_slo_s)}, "
            f"{waited_s:.3f} s of it in the queue"
        )
    if request["tpot_s"] is not None:
        sentences.append(f"then {request['tpot_s']:.4f} s per token{_kept(request['tpot_s'], tpot_slo_s)}")
    sentences.append(
        f"{request['prompt_tokens']} prompt tokens ({request['cached_tokens']} from the cache), "
        f"{request['completion_tokens']} answered"
    )
    sentences.append(_dimmed(request, in_force))
    return sentences


def _dimmed(request: Mapping[str, Any], in_force: Sequence[Mapping[str, Any]]) -> str:
    if not request["dimmed_pairs"]:
        why = "it is of class full" if request["service_class"] == "full" else "its replica saw no need or no room"
        return (
            f"exact: none of its expert work was dimmed ({why})"
            if request["level_peak"] == 0
            else (f"level {request['level_peak']} at most, but no expert work was dimmed: nothing was cold enough")
        )
    share = request["dimmed_pairs"] / max(request["routed_pairs"], 1)
    room = ""
    if in_force:
        lowest = min(row["decode"]["floor"] for row in in_force)
        highest = max(row["decode"]["ceiling"] for row in in_force)
        pinned = lowest == highest
        room = (
            f"; the level was pinned at {lowest}"
            if pinned
            else (f"; the replica's governor chose, step by step, within {lowest} to {highest}")
        )
    return (
        f"{share:.1%} of its expert pairs were dimmed, level {request['level_mean']:.2f} on average, "
        f"{request['level_peak']} at most{room}"
    )


def _kept(measured_s: float, slo_s: float | None) -> str:
    if slo_s is None:
        return ""
    return f" ({'within' if measured_s <= slo_s else 'beyond'} the promised {slo_s:g} s)"


def level_sentence(change: Mapping[str, Any]) -> str:
    """One move of a replica's own governor."""
    when = datetime.fromtimestamp(change["at_s"]).strftime("%H:%M:%S.%f")[:-3]
    return (
        f"{when} {change['replica_id']}: level {change['level_before']} to {change['level']} under setting "
        f"{change['setting_version']}, with {change['num_running']} running, {change['num_waiting']} waiting, "
        f"the oldest without a first token for {change['oldest_wait_s']:.3f} s"
    )


def summarise(requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What happened to the requests of a time range."""
    routed = sum(request["routed_pairs"] for request in requests)
    ttfts_s = sorted(request["ttft_s"] for request in requests if request["ttft_s"] is not None)
    return {
        "num_requests": len(requests),
        "num_dimmed": sum(request["dimmed_pairs"] > 0 for request in requests),
        "dimmed_share": sum(request["dimmed_pairs"] for request in requests) / routed if routed else 0.0,
        "level_peak": max((request["level_peak"] for request in requests), default=0),
        "ttft_p90_s": ttfts_s[int(0.9 * (len(ttfts_s) - 1))] if ttfts_s else None,
        "by_reason": _counted(request["finish_reason"] for request in requests),
    }


def _counted(values: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def evidence(row: Mapping[str, Any]) -> str:
    """The inputs that a reader of the decision wants first."""
    seen = row.get("inputs", {})
    if row["kind"] == "policy":
        level = row["decision"].get("level")
        return f"law {row['decision']['law']}" + ("" if level is None else f", level {level}")
    if row["kind"] == "plan":
        ready, starting = seen.get("num_ready", 0), seen.get("num_starting", 0)
        waiting, running = seen.get("num_waiting", 0), seen.get("num_running", 0)
        return f"{ready} ready, {starting} starting, {running} running, {waiting} waiting"
    if row["kind"] == "epoch":
        return f"at {row['decision']['address']}"
    parts = [
        f"{name} {seen[key] * 1000:.0f} ms"
        for name, key in (("TTFT p90", "ttft_p90_s"), ("TPOT p90", "tpot_p90_s"), ("oldest wait", "oldest_wait_s"))
        if seen.get(key)
    ]
    parts.append(f"{seen.get('num_waiting', 0)} waiting, level {seen.get('level_now', 0):.1f}")
    return ", ".join(parts)


def outcome(row: Mapping[str, Any]) -> str:
    """What was decided, in a few words."""
    decision = row["decision"]
    if row["kind"] == "plan":
        return f"{decision['desired']} replicas"
    if row["kind"] == "measures":
        return " + ".join(decision["rungs"]) or "nothing"
    if row["kind"] != "setting":
        return f"epoch {row['epoch']}" if row["kind"] == "epoch" else "policy"
    return ", ".join(
        f"{phase} {_room(decision[phase])} x{decision[phase]['margin']:.2f}" for phase in ("prefill", "decode")
    )


def _room(phase: Mapping[str, Any]) -> str:
    return str(phase["floor"]) if phase["floor"] == phase["ceiling"] else f"{phase['floor']}-{phase['ceiling']}"
