"""What serving costs on a CPU: the same closed loop into an engine of this process, then through HTTP to one replica.

Both run at level 0 with the scenario's engine configuration, one replica. The share that the serving path costs is the
part of the engine's tokens per second that does not reach an HTTP client on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.in_process import EngineClient
from benchmarks.loadgen.record import RequestRecord
from benchmarks.report import percentile
from benchmarks.results import RESULTS, markdown_table, write_result
from benchmarks.scenario import REPOSITORY, Scenario, load_scenario
from cluster.local import LocalCluster
from cluster.serve_file import IMPORT_PATH, ServeFile, load_serve_file, parse_serve_document
from engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class PathFigures:
    """One way to the engine."""

    req_s: float
    tok_s: float  # completion tokens
    ttft_p50_s: float | None
    tpot_p50_s: float | None

    @staticmethod
    def of(records: Sequence[RequestRecord], loop_spec: ClosedLoop) -> PathFigures:
        rate = throughput(records, loop_spec)
        return PathFigures(
            rate.req_s,
            rate.tok_s,
            percentile([r.ttft_s for r in records], 50),
            percentile([r.tpot_s for r in records], 50),
        )


def one_replica(serve_file: ServeFile) -> ServeFile:
    """The same application with a single engine replica."""
    document = deepcopy(serve_file.document)
    for application in document["applications"]:
        if application["import_path"] == IMPORT_PATH:
            application["args"]["replicas"] = 1
    return parse_serve_document(document)


async def measure_engine(serve_file: ServeFile, scenario: Scenario, loop_spec: ClosedLoop) -> PathFigures:
    engine = await AsyncEngine.start(serve_file.config.engine_config())
    try:
        requests = scenario.requests(engine.info.vocab_size)
        return PathFigures.of(await run_closed_loop(EngineClient(engine).send, requests, loop_spec), loop_spec)
    finally:
        await engine.stop()


async def measure_http(cluster: LocalCluster, scenario: Scenario, loop_spec: ClosedLoop) -> PathFigures:
    model = await asyncio.to_thread(cluster.model_info)
    await asyncio.to_thread(cluster.controller.set_policy, "off")
    requests = scenario.requests(model.vocab_size)
    async with CompletionClient(cluster.url, model.name, scenario.request_timeout_s) as client:
        return PathFigures.of(await run_closed_loop(client.send, requests, loop_spec), loop_spec)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_cpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--scenario", type=Path, default=REPOSITORY / "benchmarks/scenarios/demo.yaml")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--measure-s", type=float, default=20.0, help="measured seconds, after 5 s of ramp")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    scenario = load_scenario(arguments.scenario)
    serve_file = one_replica(load_serve_file(scenario.serve_config_path))
    loop_spec = ClosedLoop(arguments.concurrency, ramp_s=5.0, measure_s=arguments.measure_s)
    figures = {"engine alone": asyncio.run(measure_engine(serve_file, scenario, loop_spec))}
    with LocalCluster.start(serve_file) as cluster:
        figures["through HTTP"] = asyncio.run(measure_http(cluster, scenario, loop_spec))
    _report(figures, scenario, loop_spec, arguments.out)
    return 0


def _report(figures: dict[str, PathFigures], scenario: Scenario, loop_spec: ClosedLoop, out: Path) -> None:
    serving_share = 1 - figures["through HTTP"].tok_s / figures["engine alone"].tok_s
    write_result(
        out / "cpu_serving.json",
        {
            "seed": scenario.seed,
            "closed_loop": asdict(loop_spec),
            "paths": {name: asdict(path) for name, path in figures.items()},
            "serving_share": serving_share,
        },
    )
    rows = [
        (name, f"{f.req_s:.2f}", f"{f.tok_s:.0f}", f"{f.ttft_p50_s or 0:.3f}", f"{f.tpot_p50_s or 0:.3f}")
        for name, f in figures.items()
    ]
    header = ("path", "requests/s", "tokens/s", "TTFT p50 (s)", "TPOT p50 (s)")
    print(markdown_table(header, rows))
    print(f"The serving path costs {serving_share:.1%} of the engine's tokens per second.")


if __name__ == "__main__":
    sys.exit(main())
