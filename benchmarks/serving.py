"""What the serving path itself can carry: HTTP, ingress, router, channel, engine and back, with a real but tiny model.

Three measurements on one machine, saved in results/serving.json:

1. tokens per second with 64 streams, closed loop, into an engine of this process and then through the whole path;
2. time to first token at half of the path's rate, the same arrivals both ways; what the path adds is the difference of
   the percentiles;
3. every token of over a thousand concurrent streams against what the engine of this process gives.

benchmarks.routing and benchmarks.soak add their parts to the same file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks.direct import running
from benchmarks.loadgen.client import CompletionClient, completion_body
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.in_process import EngineClient
from benchmarks.loadgen.open_loop import run_open_loop
from benchmarks.loadgen.record import Send
from benchmarks.loadgen.sse import SseParser
from benchmarks.report import nearest_rank
from benchmarks.results import RESULTS, markdown_table, update_result
from benchmarks.tiny import MODEL, tiny_serve_file
from benchmarks.workloads.arrivals import RatePhase, draw_times
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, endless, synthesize
from cluster.local import LocalCluster
from cluster.processes import free_ports
from cluster.serve_file import ServeFile
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.models.spec import read_config
from engine.types import GenerationRequest, SamplingParams

NUM_STREAMS = 64
PROMPT_TOKENS = LengthRange(16, 64)
OUTPUT_TOKENS = LengthRange(192, 320)
NUM_INTEGRITY_STREAMS = 1024
NUM_INTEGRITY_TOKENS = 32
TIMEOUT_S = 120.0
PATHS = ("channel", "direct")


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    measure_s: float
    vocab_size: int

    def loop_spec(self) -> ClosedLoop:
        return ClosedLoop(NUM_STREAMS, ramp_s=4.0, measure_s=self.measure_s)

    def requests(self) -> list[Arrival]:
        """For the integrity check: each prompt its own."""
        source = endless(PROMPT_TOKENS, LengthRange(NUM_INTEGRITY_TOKENS, NUM_INTEGRITY_TOKENS), self.vocab_size, 1)
        return list(islice(source, NUM_INTEGRITY_STREAMS))

    def arrivals(self, tok_s: float) -> tuple[Arrival, ...]:
        """Poisson arrivals that ask for ``tok_s`` tokens per second on average."""
        times_s = draw_times([RatePhase(self.measure_s, tok_s / OUTPUT_TOKENS.mean)], self.seed)
        workload = synthesize(times_s, self.measure_s, PROMPT_TOKENS, OUTPUT_TOKENS, self.vocab_size, self.seed)
        return workload.arrivals


async def measure_rate(send: Send, plan: Plan) -> float:
    """Completion tokens per second with 64 streams."""
    requests = endless(PROMPT_TOKENS, OUTPUT_TOKENS, plan.vocab_size, plan.seed)
    spec = plan.loop_spec()
    return throughput(await run_closed_loop(send, requests, spec), spec).tok_s


async def measure_ttft_s(send: Send, plan: Plan, tok_s: float) -> list[float]:
    records = await run_open_loop(send, plan.arrivals(tok_s))
    failed = [record for record in records if not record.completed]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} requests failed, the first with: {failed[0].error}")
    return [record.ttft_s for record in records]


async def engine_texts(engine: AsyncEngine, arrivals: Sequence[Arrival]) -> list[str]:
    """What the engine of this process says to each prompt, all at once."""

    async def text_of(number: int, arrival: Arrival) -> str:
        sampling = SamplingParams(max_tokens=arrival.max_tokens, temperature=0, ignore_eos=True)
        request = GenerationRequest(f"text-{number}", arrival.prompt_ids, sampling)
        return "".join([output.text async for output in engine.generate(request)])

    return await asyncio.gather(*(text_of(number, arrival) for number, arrival in enumerate(arrivals)))


async def http_texts(url: str, arrivals: Sequence[Arrival]) -> list[str]:
    """The same through the whole path, all at once."""

    async def text_of(session: aiohttp.ClientSession, arrival: Arrival) -> str:
        parser, texts = SseParser(), []
        async with session.post(f"{url}/v1/completions", json=completion_body(MODEL, arrival)) as response:
            response.raise_for_status()
            async for chunk in response.content.iter_any():
                events = [json.loads(data) for data in parser.feed(chunk) if data != b"[DONE]"]
                texts += [choice["text"] for event in events for choice in event["choices"]]
        return "".join(texts)

    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return await asyncio.gather(*(text_of(session, arrival) for arrival in arrivals))


@dataclass(frozen=True, slots=True)
class PathFigures:
    """One way to the engine."""

    streams64_tok_s: float
    ttft_ms: dict[str, float]

    @staticmethod
    def of(tok_s: float, ttfts_s: Sequence[float]) -> PathFigures:
        return PathFigures(tok_s, {f"p{q}": 1e3 * nearest_rank(ttfts_s, q) for q in (50, 90, 99)})


async def measure(url: str, config: EngineConfig, plan: Plan) -> dict[str, Any]:
    """The figures of the path behind ``url``, next to the engine's alone."""
    async with CompletionClient(url, MODEL, TIMEOUT_S) as client:
        path_tok_s = await measure_rate(client.send, plan)
        half_load_tok_s = path_tok_s / 2
        path = PathFigures.of(path_tok_s, await measure_ttft_s(client.send, plan, half_load_tok_s))
        texts = await http_texts(url, plan.requests())
    engine = await AsyncEngine.start(config)
    try:
        send = EngineClient(engine).send
        await measure_ttft_s(send, replace(plan, measure_s=2.0), half_load_tok_s)  # the first steps are slow
        alone = PathFigures.of(await measure_rate(send, plan), await measure_ttft_s(send, plan, half_load_tok_s))
        expected = await engine_texts(engine, plan.requests())
    finally:
        await engine.stop()
    return {
        "streams64_tok_s": path_tok_s,
        "added_ttft_ms": {q: path.ttft_ms[q] - alone.ttft_ms[q] for q in path.ttft_ms},
        "half_load_tok_s": half_load_tok_s,
        "ttft_ms": path.ttft_ms,
        "engine_alone": asdict(alone),
        "integrity": {
            "streams": len(texts),
            "wrong": sum(text != right for text, right in zip(texts, expected, strict=True)),
        },
    }


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
    parser.add_argument("--path", choices=PATHS, default="channel", help="channel: what is shipped")
    parser.add_argument("--measure-s", type=float, default=20.0, help="seconds of each measurement")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        serve_file = tiny_serve_file(Path(directory))
        config = serve_file.config.engine_config()
        plan = Plan(arguments.seed, arguments.measure_s, read_config(Path(config.model.path))["vocab_size"])
        with path_to_engine(arguments.path, serve_file, Path(directory)) as url:
            figures = asyncio.run(measure(url, config, plan))
    shipped = {key: figures[key] for key in ("streams64_tok_s", "added_ttft_ms")} if arguments.path == "channel" else {}
    update_result(arguments.out, {**shipped, "paths": {arguments.path: figures}})
    rows = [
        ("engine alone", f"{figures['engine_alone']['streams64_tok_s']:.0f}", *_cells(figures["engine_alone"])),
        (arguments.path, f"{figures['streams64_tok_s']:.0f}", *_cells(figures)),
    ]
    print(markdown_table(("path", "tokens/s with 64 streams", "TTFT p50 (ms)", "p90", "p99"), rows))
    added, integrity = figures["added_ttft_ms"], figures["integrity"]
    print(f"Added TTFT at half load: p50 {added['p50']:.1f} ms, p99 {added['p99']:.1f} ms.")
    print(f"{integrity['wrong']} of {integrity['streams']} streams differ from the engine's own tokens.")
    return 1 if integrity["wrong"] else 0


def _cells(figures: dict[str, Any]) -> list[str]:
    return [f"{figures['ttft_ms'][q]:.1f}" for q in ("p50", "p90", "p99")]


if __name__ == "__main__":
    sys.exit(main())
