"""What arrives, and when: the same arrivals for every law of one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.scenario import REPOSITORY
from benchmarks.simulator.scenario import ScenarioFile, TrafficSection
from benchmarks.workloads.arrivals import RatePhase, draw_times
from benchmarks.workloads.trace import read_rows


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    num_prompt: int
    num_output: int
    full: bool = False  # class ``full``: never dimmed


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in order of time; ``duration_s`` is how long they are offered."""

    requests: tuple[Request, ...]
    duration_s: float


def build_traffic(scenario: ScenarioFile, capacity_req_s: float, seed: int) -> Traffic:
    """The scenario's arrivals on the simulated replicas. A sampled fleet gets its share of them."""
    section, share = scenario.traffic, scenario.fleet.num_simulated / scenario.fleet.replicas
    rng = np.random.default_rng([seed, 1])
    if section.trace is not None:
        rows = read_rows(REPOSITORY / section.trace.path)
        limit = section.trace.max_input_tokens or 1 << 30
        kept = [row for row in rows if rng.random() < share]
        speed = section.trace.speed
        requests = [Request(at_s / speed, min(prompt, limit), output) for at_s, prompt, output in kept]
        duration_s = rows[-1][0] / speed
    else:
        # Each seed draws gaps, lengths and classes anew.
        phases = [RatePhase(p.duration_s, p.load * capacity_req_s * share) for p in section.phases]
        times_s = draw_times(phases, seed, section.arrival_cv)
        lengths = draw_lengths(section, len(times_s), rng)
        requests = [Request(at_s, *pair) for at_s, pair in zip(times_s, lengths, strict=True)]
        duration_s = sum(p.duration_s for p in section.phases)
    if section.full_frac:
        requests = [Request(r.at_s, r.num_prompt, r.num_output, rng.random() < section.full_frac) for r in requests]
    return Traffic(tuple(requests), duration_s)


def saturating(scenario: ScenarioFile, num_requests: int, seed: int) -> Traffic:
    """Requests of the scenario's lengths that are all there at once, to measure capacity."""
    rng = np.random.default_rng([seed, 2])
    return Traffic(tuple(Request(0.0, *pair) for pair in draw_lengths(scenario.traffic, num_requests, rng)), 0.0)


def draw_lengths(section: TrafficSection, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(prompt, output) tokens by inverse transform of the quantiles; independent of each other."""
    drawn = []
    for quantiles in (section.prompt_quantiles, section.output_quantiles):
        at = np.linspace(0, 1, len(quantiles))
        drawn.append(np.maximum(1, np.interp(rng.random(count), at, quantiles).round()).astype(int).tolist())
    return list(zip(*drawn, strict=True))
