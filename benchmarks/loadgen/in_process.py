"""The same requests without HTTP: straight into an engine of this process."""

from __future__ import annotations

from itertools import count

from benchmarks.loadgen.record import Clock, Outcome, RequestRecord
from benchmarks.workloads.workload import Arrival
from engine.async_engine import AsyncEngine
from engine.types import FinishReason, GenerationRequest, SamplingParams


class EngineClient:
    """``send`` for an AsyncEngine; requests are what CompletionClient asks of a server."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._ids = count()

    async def send(self, arrival: Arrival, clock: Clock) -> RequestRecord:
        sampling = SamplingParams(max_tokens=arrival.max_tokens, temperature=0, seed=arrival.seed, ignore_eos=True)
        request = GenerationRequest(f"bench-{next(self._ids)}", arrival.prompt_ids, sampling)
        sent_s = clock()
        first_token_s = last_token_s = None
        async for output in self._engine.generate(request):
            if output.token_ids:
                last_token_s = clock()
                first_token_s = last_token_s if first_token_s is None else first_token_s
        completed = output.finish_reason is FinishReason.LENGTH and output.usage is not None
        return RequestRecord(
            scheduled_s=arrival.at_s,
            sent_s=sent_s,
            outcome=Outcome.COMPLETED if completed else Outcome.STREAM_ERROR,
            first_token_s=first_token_s,
            last_token_s=last_token_s,
            num_prompt_tokens=len(arrival.prompt_ids),
            num_tokens=output.usage.completion_tokens if output.usage else 0,
            brownout=output.usage.brownout if output.usage else None,
            error=output.error,
        )
