"""What the serving path itself can carry: HTTP, ingress, router, channel, engine and back, with a real but tiny model.

    python -m benchmarks.serving
    python -m benchmarks.serving --scenario benchmarks/scenarios/demo.yaml      a scenario's model and lengths instead

Three measurements on one machine, at level 0, one replica, saved in results/serving.json (a scenario's in
results/cpu_serving.json):

1. tokens per second with 64 streams, closed loop, into an engine of this process and then through the whole path;
2. time to first token at half of the path's rate, the same arrivals both ways; what the path adds is the difference of
   the percentiles;
3. every token of over a thousand concurrent streams against what the engine of this process gives (not for a
   scenario: its model may have logits that are nearly equal, and then tokens depend on who shares the step).

benchmarks.routing and benchmarks.soak add their parts to the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import RESULTS, markdown_table, result_file, update_result, write_result
from benchmarks.scenario import Scenario, load_scenario
from benchmarks.serving.direct import running
from benchmarks.serving.measure import Plan, measure
from benchmarks.tiny import tiny_serve_file
from cluster.local.cluster import LocalCluster
from cluster.local.processes import free_ports
from cluster.serve_file import IMPORT_PATH, ServeFile, load_serve_file, parse_serve_document
from engine.models.spec import read_config

PATHS = ("channel", "direct")


@contextmanager
def path_to_engine(path: str, serve_file: ServeFile, directory: Path) -> Iterator[str]:
    """Starts a server and yields its URL."""
    port = free_ports(1)[0]
    if path == "direct":
        serve_yaml = directory / "serve.yaml"
        serve_yaml.write_text(yaml.safe_dump(serve_file.document))
        with running(serve_yaml, port) as url:
            yield url
        return
    with LocalCluster.start(serve_file, port=port) as cluster:
        yield cluster.url


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenario", type=Path, help="another model: that of a scenario file, with its lengths")
    parser.add_argument("--path", choices=PATHS, default="channel", help="channel: what is shipped")
    parser.add_argument("--measure-s", type=float, default=20.0, help="seconds of each measurement")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument(
        "--out", type=result_file, help="default: serving.json, with --scenario cpu_serving.json, in results/"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scenario = load_scenario(arguments.scenario) if arguments.scenario else None
        serve_file = one_replica_at_level_0(scenario) if scenario else tiny_serve_file(Path(directory))
        config = serve_file.config.engine_config()
        vocab_size = read_config(Path(config.model.path))["vocab_size"]
        plan = Plan(config.model.served_name, vocab_size, arguments.seed, arguments.measure_s)
        if scenario:
            lengths = {"prompt_tokens": scenario.prompt_tokens.range, "output_tokens": scenario.output_tokens.range}
            plan = replace(plan, **lengths)
        with path_to_engine(arguments.path, serve_file, Path(directory)) as url:
            figures = asyncio.run(measure(url, config, plan, check=scenario is None))
    if scenario:
        out = arguments.out or RESULTS / "cpu_serving.json"
        write_result(out, {"model": plan.model, "seed": plan.seed, "path": arguments.path, **figures})
    else:
        shipped = ("streams64_tok_s", "added_ttft_ms") if arguments.path == "channel" else ()
        out = arguments.out or RESULTS / "serving.json"
        update_result(out, {**{key: figures[key] for key in shipped}, "paths": {arguments.path: figures}})
    return _report(arguments.path, figures)


def one_replica_at_level_0(scenario: Scenario) -> ServeFile:
    """The scenario's application with the first of its models, as it is measured here."""
    document = deepcopy(load_serve_file(scenario.serve_config_path).document)
    for application in document["applications"]:
        if application["import_path"] == IMPORT_PATH:
            first, *_ = application["args"].pop("models", [{}])
            application["args"] |= first | {"replicas": 1, "controller": {"law": "static", "level": 0}}
    return parse_serve_document(document)


def _report(path: str, figures: dict[str, Any]) -> int:
    """Prints the figures; the exit code."""
    rows = [
        ("engine alone", f"{figures['engine_alone']['streams64_tok_s']:.0f}", *_cells(figures["engine_alone"])),
        (path, f"{figures['streams64_tok_s']:.0f}", *_cells(figures)),
    ]
    print(markdown_table(("path", "tokens/s with 64 streams", "TTFT p50 (ms)", "p90", "p99"), rows))
    added = figures["added_ttft_ms"]
    print(f"Added TTFT at half load: p50 {added['p50']:.1f} ms, p99 {added['p99']:.1f} ms.")
    if integrity := figures.get("integrity"):
        print(f"{integrity['wrong']} of {integrity['streams']} streams differ from the engine's own tokens.")
        return int(integrity["wrong"] > 0)
    return 0


def _cells(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['ttft_ms'][q]:.1f}" for q in ("p50", "p90", "p99")]


if __name__ == "__main__":
    sys.exit(main())
