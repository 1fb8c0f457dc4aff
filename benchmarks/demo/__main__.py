"""``make demo``: a whole cluster on this machine, the same burst without and with brownout, one table.

Starts a local cluster, lets its trained model continue some prompts, measures the capacity at level 0, replays
quiet / burst / quiet twice, writes ``report.json`` and ``burst.png``, and stops all that it started, also when it fails
or is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks.demo.live import RequestMonitor, every
from benchmarks.demo.samples import Sample, read_samples, samples_table
from benchmarks.demo.summary import Measurement, Run, render_table, write_results
from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import Throughput, measure_throughput
from benchmarks.loadgen.open_loop import run_open_loop
from benchmarks.plots.burst import LevelSample
from benchmarks.report import Slo, measure
from benchmarks.scenario import REPOSITORY, Scenario, ScenarioError, load_scenario
from benchmarks.workloads.workload import Workload
from cluster.local.cluster import LocalCluster
from cluster.serve_file import ServeFile, load_serve_file
from engine.config import ConfigError

POLICIES = {"off": "off", "on": "auto"}  # run -> the controller's policy; auto: the law of the Serve file
SAMPLE_PERIOD_S = 0.25
MIN_MEASURED = 8  # answers while the capacity is measured: of fewer it says little, and of none nothing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for report.json and burst.png")
    parser.add_argument("--scenario", type=Path, default=REPOSITORY / "benchmarks/scenarios/demo.yaml")
    arguments = parser.parse_args(argv)
    console = Console()
    _end_by_sigterm_as_by_ctrl_c()
    try:
        scenario = load_scenario(arguments.scenario)
        serve_file = load_serve_file(scenario.serve_config_path)
        slo = Slo(serve_file.config.slo.ttft_s, serve_file.config.slo.tpot_s)
        with _running(serve_file, console) as cluster:
            demo = BurstDemo(cluster, scenario, slo, console)
            _end_by_sigterm_as_by_ctrl_c()  # again, because joining Ray as a driver makes SIGTERM abort the process
            measurement = asyncio.run(demo.run())
    except (ScenarioError, ConfigError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    except (RuntimeError, httpx.HTTPError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; everything is stopped")
        return 130
    write_results(measurement, scenario, arguments.out)
    console.print(render_table(measurement, scenario))
    console.print(f"wrote {arguments.out / 'report.json'} and {arguments.out / 'burst.png'}")
    return 0


@contextmanager
def _running(serve_file: ServeFile, console: Console) -> Iterator[LocalCluster]:
    with console.status("starting Ray, Redis, the controller, the ingress and the replicas (half a minute)"):
        cluster = LocalCluster.start(serve_file)
    try:
        console.print(f"cluster is up at {cluster.url}")
        yield cluster
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        with console.status("stopping the cluster"):
            cluster.stop()
        signal.signal(signal.SIGINT, interrupt)


class BurstDemo:
    """The measurements on a running cluster."""

    def __init__(self, cluster: LocalCluster, scenario: Scenario, slo: Slo, console: Console) -> None:
        self._cluster = cluster
        self._controller = cluster.controller
        self._scenario = scenario
        self._slo = slo
        self._console = console

    async def run(self) -> Measurement:
        """Capacity first, then each policy with the same arrivals."""
        scenario = self._scenario
        samples = await self._samples()
        model = await asyncio.to_thread(self._cluster.model_info)
        async with CompletionClient(self._cluster.url, model.name, scenario.request_timeout_s) as client:
            capacity = await self._capacity(client, model.vocab_size)
            workload = scenario.workload(capacity.req_s, model.vocab_size)
            runs = {
                name: await self._replay(name, client, workload.marked(mark), model.name)
                for mark, name in enumerate(POLICIES)
            }
        return Measurement(model, self._slo, capacity, workload, runs, samples)

    async def _samples(self) -> list[Sample]:
        if (section := self._scenario.samples) is None:
            return []
        with self._console.status(f"{section.model} continues {len(section.prompts)} prompts"):
            samples = await asyncio.to_thread(
                read_samples, self._cluster.url, self._controller, section, self._scenario.seed
            )
        self._console.print(samples_table(samples))
        return samples

    async def _capacity(self, client: CompletionClient, vocab_size: int) -> Throughput:
        """Requests per second that the cluster completes at level 0 when it is never idle."""
        await asyncio.to_thread(self._controller.set_policy, POLICIES["off"])
        loop_spec = self._scenario.capacity.closed_loop
        requests = self._scenario.requests(vocab_size)
        with self._console.status(f"measuring capacity: {loop_spec.concurrency} clients for {loop_spec.end_s:g} s"):
            capacity = await measure_throughput(
                client.send, requests, loop_spec, MIN_MEASURED, self._scenario.request_timeout_s
            )
        self._console.print(f"capacity at level 0: {capacity.req_s:.1f} requests/s, {capacity.tok_s:.0f} tokens/s")
        return capacity

    async def _replay(self, name: str, client: CompletionClient, workload: Workload, model: str) -> Run:
        await asyncio.to_thread(self._controller.set_policy, POLICIES[name])
        await asyncio.to_thread(self._controller.wait_applied, model)
        await asyncio.sleep(self._scenario.settle_s)
        monitor = RequestMonitor()
        levels: list[LevelSample] = []
        with self._console.status(f"brownout {name}") as status:

            def sample(at_s: float) -> None:
                levels.append(LevelSample(at_s, level := _level_now(self._controller.status(), model)))
                phase = self._scenario.phase_at(at_s)
                progress = monitor.progress(at_s, len(workload.arrivals))
                status.update(f"brownout {name}  {at_s:5.1f} s {phase:5}  {progress}  level {level:.1f}")

            async with every(SAMPLE_PERIOD_S, sample):
                records = await run_open_loop(monitor.watch(client.send), workload.arrivals)
        metrics = measure(records, self._slo, workload.duration_s)
        self._console.print(
            f"brownout {name}: {metrics.requests} requests, {metrics.failed} failed, "
            f"{metrics.violation_s} s in violation, SLO attainment {metrics.slo_attainment:.1%}"
        )
        return Run(metrics, records, levels)


def _end_by_sigterm_as_by_ctrl_c() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _level_now(status: dict[str, Any], model: str) -> float:
    """Mean decode level of the model's replicas."""
    level: float = status["models"][model]["observation"]["level_now"]
    return level


if __name__ == "__main__":
    sys.exit(main())
