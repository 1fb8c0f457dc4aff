"""Running scenarios under laws and seeds, and the figures of each run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import SecondStats, Slo, by_second, measure
from benchmarks.simulator.cluster import Outcome, SimulatedCluster
from benchmarks.simulator.replica import ReplicaLog
from benchmarks.simulator.scenario import ScenarioFile, SimulationError
from benchmarks.simulator.traffic import Traffic, build_traffic, saturating
from controller.laws.base import LAWS
from controller.model_control import Policy

CAPACITY_SEED = 1
CAPACITY_REQUESTS = 4000
CAPACITY_RAMP_S = 4.0
CAPACITY_MEASURE_S = 12.0
ORACLE = "strongest"  # the ladder's top throughout
NONE = "none"  # level 0 throughout
NAMED_LAWS = (*(law for law in LAWS if law != "static"), NONE, ORACLE)


@dataclass(frozen=True, slots=True)
class Row:
    """One run's figures, as control.json has them."""

    scenario: str
    law: str
    seed: int
    attainment: float  # share of requests that met TTFT and TPOT
    violation_s: int
    mean_loss: float  # nats per computed token
    moves_per_s: float  # level changes of a replica
    reaction_s: float | None  # from the queue's signal to the first dimmed step; None: it never came
    live: bool
    violations: int  # requests that missed the SLO, refused ones included
    requests: int
    rejected: int
    ttft_p90_s: float | None
    ttft_p99_s: float | None
    tpot_p90_s: float | None
    level_mean: float
    level_peak: int
    settle_s: float | None  # after the last phase of full load: until level 0 stays
    goodput_tok_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """A row, and what the plots need."""

    row: Row
    outcome: Outcome
    seconds: list[SecondStats]


def policy_of(law: str, scenario: ScenarioFile) -> Policy:
    """A law by name; ``none`` and ``strongest`` pin the ladder's ends, ``static:3`` pins level 3."""
    top = len(scenario.plant.levels) - 1
    name, _, level = law.partition(":")
    if law in (NONE, ORACLE):
        return Policy("static", {"level": 0 if law == NONE else top})
    if name == "static" and level.isdecimal():
        return Policy("static", {"level": int(level)})
    if law not in LAWS or law == "static":
        raise SimulationError(f"law is {law!r}; allowed: {', '.join(NAMED_LAWS)}, static:LEVEL")
    return Policy(law, scenario.law_params.get(law, {}))


def measure_capacity(scenario: ScenarioFile) -> float:
    """Requests/s that the whole fleet completes at level 0 when its queues are never empty; 0 for a trace."""
    if scenario.traffic.trace is not None:
        return 0.0
    fleet = scenario.fleet.model_copy(update={"replicas": 1, "speeds": ()})
    one = scenario.model_copy(update={"fleet": fleet})
    end_s = CAPACITY_RAMP_S + CAPACITY_MEASURE_S
    traffic = saturating(one, num_requests=CAPACITY_REQUESTS, seed=CAPACITY_SEED)
    outcome = SimulatedCluster(one, policy_of(NONE, one), CAPACITY_SEED).run(traffic, end_s)
    ended = [r.last_token_s for log in outcome.logs for r in log.records if r.last_token_s is not None]
    per_replica = sum(CAPACITY_RAMP_S <= at_s < end_s for at_s in ended) / CAPACITY_MEASURE_S
    speeds = [*scenario.fleet.speeds, *[1.0] * scenario.fleet.replicas][: scenario.fleet.replicas]
    return per_replica * sum(speeds)


def run_once(
    scenario: ScenarioFile,
    law: str,
    seed: int,
    capacity_req_s: float,
    on_progress: Callable[[int], None] | None = None,
) -> Run:
    """One law, one seed."""
    traffic = build_traffic(scenario, capacity_req_s, seed)
    outcome = SimulatedCluster(scenario, policy_of(law, scenario), seed).run(traffic, on_progress=on_progress)
    return summarize(scenario, law, seed, traffic, outcome)


def summarize(scenario: ScenarioFile, law: str, seed: int, traffic: Traffic, outcome: Outcome) -> Run:
    slo = Slo(scenario.slo.ttft_s, scenario.slo.tpot_s)
    records = [record for log in outcome.logs for record in log.records]
    metrics = measure(records, slo, traffic.duration_s)
    num_tokens = sum(log.num_tokens for log in outcome.logs)
    moves = sum(max(len(log.levels) - 1, 0) for log in outcome.logs)
    row = Row(
        scenario=scenario.name,
        law=law,
        seed=seed,
        attainment=metrics.slo_attainment,
        violation_s=metrics.violation_s,
        mean_loss=sum(log.loss_nats for log in outcome.logs) / num_tokens,
        moves_per_s=moves / outcome.end_s / len(outcome.logs),
        reaction_s=_reaction_s(outcome),
        live=False,
        violations=round(metrics.requests * (1 - metrics.slo_attainment)),
        requests=metrics.requests,
        rejected=metrics.failed,
        ttft_p90_s=metrics.ttft_p90_s,
        ttft_p99_s=metrics.ttft_p99_s,
        tpot_p90_s=metrics.tpot_p90_s,
        level_mean=metrics.level_mean,
        level_peak=metrics.level_peak,
        settle_s=_settle_s(scenario, outcome),
        goodput_tok_s=metrics.goodput_tok_s,
    )
    return Run(row, outcome, by_second(records))


def _reaction_s(outcome: Outcome) -> float | None:
    """The slowest replica's; 0 if all dimmed before any queue asked for it, None if one never followed its queue."""
    asked = [log for log in outcome.logs if log.signal_s is not None]
    if not asked:
        return 0.0 if any(level for log in outcome.logs for _, level in log.levels) else None
    reactions = [log.reaction_s for log in asked if log.reaction_s is not None]
    return max(reactions) if len(reactions) == len(asked) else None


def _settle_s(scenario: ScenarioFile, outcome: Outcome) -> float | None:
    """From the end of the last phase above capacity until every replica was at level 0 once, or the run ended."""
    end_s, over_s = 0.0, None
    for phase in scenario.traffic.phases:
        end_s += phase.duration_s
        over_s = end_s if phase.load > 1 else over_s
    if over_s is None:
        return None
    return max(_back_at_zero_s(log, over_s, outcome.end_s) for log in outcome.logs) - over_s


def _back_at_zero_s(log: ReplicaLog, after_s: float, end_s: float) -> float:
    level_before = next((level for at_s, level in reversed(log.levels) if at_s <= after_s), 0)
    if level_before == 0:
        return after_s
    return next((at_s for at_s, level in log.levels if at_s > after_s and level == 0), end_s)


def means(rows: list[Row]) -> dict[str, Any]:
    """Mean of each figure over seeds; None where no seed has one."""
    dicts = [asdict(row) for row in rows]
    out: dict[str, Any] = {"scenario": rows[0].scenario, "law": rows[0].law, "seeds": len(rows)}
    for key in dicts[0]:
        values = [d[key] for d in dicts if isinstance(d[key], (int, float)) and not isinstance(d[key], bool)]
        if key != "seed" and values:
            out[key] = sum(values) / len(values)
    return out
