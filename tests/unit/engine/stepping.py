"""Engines that tests step themselves, on a clock that stands still: made, asked, run to the end."""

from __future__ import annotations

from engine.config import BrownoutConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import (
    GenerationRequest,
    RequestOutput,
    SamplingParams,
    ServiceClass,
)

UNITED = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)
TOP_LEVEL = 4
PROMPT = tuple(range(100, 140))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_engine(model: str, clock: Clock | None = None, **parts: object) -> Engine:
    parts.setdefault("scheduler", SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64))
    config = EngineConfig(ModelConfig(model, load_format="random"), **parts)  # type: ignore[arg-type]
    return Engine(config, clock or Clock())


def request(request_id: str = "a", prompt: tuple[int, ...] = PROMPT, **options: object) -> GenerationRequest:
    service_class = options.pop("service_class", ServiceClass.STANDARD)
    params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | options
    return GenerationRequest(request_id, prompt, SamplingParams(**params), service_class)  # type: ignore[arg-type]


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {r.request_id: [] for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
