"""Closed loop: a fixed number of clients, each of which sends its next request when the last one is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.loadgen.record import RequestRecord, Send
from benchmarks.workloads.workload import Arrival


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """``concurrency`` clients start evenly over ``ramp_s``, lest they move in step; then ``measure_s`` counts."""

    concurrency: int
    ramp_s: float
    measure_s: float

    @property
    def end_s(self) -> float:
        return self.ramp_s + self.measure_s


@dataclass(frozen=True, slots=True)
class Throughput:
    """Rates over the measured part of a closed loop, by requests completed in it."""

    req_s: float
    tok_s: float  # completion tokens


async def measure_throughput(
    send: Send, requests: Iterator[Arrival], loop_spec: ClosedLoop, min_completed: int, max_measure_s: float
) -> Throughput:
    """Measure again for twice as long until ``min_completed`` requests were completed within the measured part: on a
    machine that is slow or busy, few or none are. Raises RuntimeError like `throughput`.
    """
    while True:
        records = await run_closed_loop(send, requests, loop_spec)
        enough = len(_measured(records, loop_spec)) >= min_completed
        if enough or not all(record.completed for record in records) or 2 * loop_spec.measure_s > max_measure_s:
            return throughput(records, loop_spec)
        loop_spec = replace(loop_spec, measure_s=2 * loop_spec.measure_s)


async def run_closed_loop(send: Send, requests: Iterator[Arrival], loop_spec: ClosedLoop) -> list[RequestRecord]:
    """Records in order of completion. A client stops at its first failed request instead of hammering the server."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    records: list[RequestRecord] = []

    def clock() -> float:
        return loop.time() - start_s

    async def run_client(index: int) -> None:
        await asyncio.sleep(loop_spec.ramp_s * index / loop_spec.concurrency)
        while clock() < loop_spec.end_s:
            record = await send(replace(next(requests), at_s=clock()), clock)
            records.append(record)
            if not record.completed:
                return

    async with asyncio.TaskGroup() as group:
        for index in range(loop_spec.concurrency):
            group.create_task(run_client(index))
    return records


def throughput(records: Sequence[RequestRecord], loop_spec: ClosedLoop) -> Throughput:
    """Raises RuntimeError when a request failed, or none was completed: such a rate means nothing."""
    failed = [r for r in records if not r.completed]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(records)} requests failed, the first with: {failed[0].error}")
    counted = _measured(records, loop_spec)
    if not counted:
        raise RuntimeError(f"no request was completed within the measured {loop_spec.measure_s:g} s; measure longer")
    return Throughput(len(counted) / loop_spec.measure_s, sum(r.num_tokens for r in counted) / loop_spec.measure_s)


def _measured(records: Sequence[RequestRecord], loop_spec: ClosedLoop) -> list[RequestRecord]:
    return [r for r in records if r.last_token_s is not None and loop_spec.ramp_s <= r.last_token_s < loop_spec.end_s]
