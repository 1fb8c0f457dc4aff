"""Rate, time to first token and texts of one way to an engine, beside those of an engine of this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import aiohttp

from benchmarks.loadgen.client import CompletionClient, completion_body
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.in_process import EngineClient
from benchmarks.loadgen.open_loop import run_open_loop
from benchmarks.loadgen.record import Send
from benchmarks.loadgen.sse import SseParser
from benchmarks.report import nearest_rank
from benchmarks.workloads.arrivals import RatePhase, draw_times
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, endless, synthesize
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.types import GenerationRequest, SamplingParams

NUM_STREAMS = 64
PROMPT_TOKENS, OUTPUT_TOKENS = LengthRange(16, 64), LengthRange(192, 320)  # unless a scenario says otherwise
NUM_INTEGRITY_STREAMS = 1024
NUM_INTEGRITY_TOKENS = 32
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of which model."""

    model: str
    vocab_size: int
    seed: int
    measure_s: float
    prompt_tokens: LengthRange = PROMPT_TOKENS
    output_tokens: LengthRange = OUTPUT_TOKENS

    def requests(self) -> Iterator[Arrival]:
        """For the closed loop."""
        return endless(self.prompt_tokens, self.output_tokens, self.vocab_size, self.seed)

    def arrivals(self, tok_s: float) -> tuple[Arrival, ...]:
        """Poisson arrivals that ask for ``tok_s`` tokens per second on average."""
        times_s = draw_times([RatePhase(self.measure_s, tok_s / self.output_tokens.mean)], self.seed)
        workload = synthesize(
            times_s, self.measure_s, self.prompt_tokens, self.output_tokens, self.vocab_size, self.seed
        )
        return workload.arrivals

    def checked(self) -> list[Arrival]:
        """For the integrity check: each prompt its own."""
        source = endless(
            self.prompt_tokens, LengthRange(NUM_INTEGRITY_TOKENS, NUM_INTEGRITY_TOKENS), self.vocab_size, 1
        )
        return list(islice(source, NUM_INTEGRITY_STREAMS))


async def measure_rate(send: Send, plan: Plan) -> float:
    """Completion tokens per second with 64 streams."""
    spec = ClosedLoop(NUM_STREAMS, ramp_s=4.0, measure_s=plan.measure_s)
    return throughput(await run_closed_loop(send, plan.requests(), spec), spec).tok_s


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


async def http_texts(url: str, model: str, arrivals: Sequence[Arrival]) -> list[str]:
    """The same through the whole path, all at once."""

    async def text_of(session: aiohttp.ClientSession, arrival: Arrival) -> str:
        parser, texts = SseParser(), []
        async with session.post(f"{url}/v1/completions", json=completion_body(model, arrival)) as response:
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


async def measure(url: str, config: EngineConfig, plan: Plan, check: bool) -> dict[str, Any]:
    """The figures of the path behind ``url``, next to the engine's alone; ``check`` the texts too."""
    arrivals = plan.checked() if check else []
    async with CompletionClient(url, plan.model, TIMEOUT_S) as client:
        path_tok_s = await measure_rate(client.send, plan)
        half_load_tok_s = path_tok_s / 2
        path = PathFigures.of(path_tok_s, await measure_ttft_s(client.send, plan, half_load_tok_s))
        texts = await http_texts(url, plan.model, arrivals)
    engine = await AsyncEngine.start(config)
    try:
        send = EngineClient(engine).send
        await measure_ttft_s(send, replace(plan, measure_s=2.0), half_load_tok_s)  # the first steps are slow
        alone = PathFigures.of(await measure_rate(send, plan), await measure_ttft_s(send, plan, half_load_tok_s))
        expected = await engine_texts(engine, arrivals)
    finally:
        await engine.stop()
    wrong = sum(text != right for text, right in zip(texts, expected, strict=True))
    return {
        "streams64_tok_s": path_tok_s,
        "added_ttft_ms": {q: path.ttft_ms[q] - alone.ttft_ms[q] for q in path.ttft_ms},
        "half_load_tok_s": half_load_tok_s,
        "ttft_ms": path.ttft_ms,
        "engine_alone": asdict(alone),
        **({"integrity": {"streams": len(texts), "wrong": wrong}} if check else {}),
    }
