"""The least loss that could keep a promise: what a law would spend that knew every arrival beforehand.

A fluid replica instead of a simulated one: held requests h(t) are a real number, of which min(h, max_num_seqs) decode;
at level l they finish at the rate rows / (mean answer * step time), prompts ride along in proportion. Dynamic
programming over time and h picks the levels of least summed loss such that whoever waits has come within the TTFT SLO
and, where some level keeps it, every step keeps the TPOT SLO. An estimate and no proof: answers all have the mean
length, and the level may change at no cost in every interval of DT_S.
"""

from __future__ import annotations

import numpy as np

from benchmarks.simulator.plant import Load, Plant
from benchmarks.simulator.scenario import ScenarioFile, SimulationError
from benchmarks.simulator.traffic import Traffic

DT_S = 0.05
LATE_NATS = 1e3  # for each request that waits too long, per second: more than any level could lose
DRAIN_S = 20.0  # after the last arrival
CONTEXT_FRAC = 0.6  # of an answer is there when a row decodes, on average: long answers decode more often


def least_loss(scenario: ScenarioFile, traffic: Traffic) -> float:
    """Nats per computed token, of one replica."""
    if scenario.fleet.replicas != 1:
        raise SimulationError(f"{scenario.name} has {scenario.fleet.replicas} replicas; allowed: 1")
    rate, tokens, keeps_pace = _fluid(scenario, traffic)
    nats = tokens * np.array([level.loss for level in scenario.plant.levels])[:, None]
    cost = np.where(keeps_pace | ~keeps_pace.any(axis=0), nats, np.inf)
    num_steps = int((traffic.duration_s + DRAIN_S) / DT_S)
    arrived, _ = np.histogram([r.at_s for r in traffic.requests], bins=num_steps, range=(0, num_steps * DT_S))
    recently = np.convolve(arrived, np.ones(int(scenario.slo.ttft_s / DT_S)))[:num_steps]
    held = np.arange(rate.shape[1])
    waiting = np.maximum(0, held - scenario.engine.max_num_seqs)
    to_go = np.zeros(len(held))  # least cost from here to the end, by held requests
    for step in reversed(range(num_steps)):
        late = np.maximum(0, waiting - recently[step])
        after = np.clip(held + arrived[step] - rate * DT_S, 0, held[-1])  # [levels, held]
        to_go = (cost * DT_S + np.interp(after, held, to_go)).min(axis=0) + LATE_NATS * late * DT_S
    return float(to_go[0]) / sum(r.num_prompt + r.num_output for r in traffic.requests)


def _fluid(scenario: ScenarioFile, traffic: Traffic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(requests finished per second, tokens computed per second, whether TPOT is kept), each [levels, held]."""
    plant, places = Plant(scenario.plant), scenario.engine.max_num_seqs
    mean_output = float(np.mean([r.num_output for r in traffic.requests]))
    mean_prompt = float(np.mean([r.num_prompt for r in traffic.requests]))
    rows = np.minimum(np.arange(3 * places), places)
    step_s = np.full((plant.num_levels, len(rows)), np.inf)
    for level in range(plant.num_levels):
        by_rows = [
            plant.step_s(
                Load(n, round(n * mean_prompt / mean_output), 0, round(n * (mean_prompt + CONTEXT_FRAC * mean_output))),
                level,
                level,
            )
            for n in range(1, places + 1)
        ]
        step_s[level, 1:] = np.array(by_rows)[rows[1:] - 1]
    return (
        rows / mean_output / step_s,
        rows * (1 + mean_prompt / mean_output) / step_s,
        step_s <= scenario.slo.tpot_s,
    )
