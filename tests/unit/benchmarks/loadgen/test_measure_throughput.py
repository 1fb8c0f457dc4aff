"""A capacity is measured for as long as it takes to have something to count."""

from __future__ import annotations

import asyncio
from itertools import repeat

import pytest

from benchmarks.loadgen.closed_loop import ClosedLoop, measure_throughput
from benchmarks.loadgen.record import Clock, Outcome, RequestRecord
from benchmarks.workloads.workload import Arrival

ARRIVAL = Arrival(0.0, (1, 2), max_tokens=4, seed=0)


async def slow(arrival: Arrival, clock: Clock) -> RequestRecord:
    await asyncio.sleep(0.1)
    return RequestRecord(arrival.at_s, arrival.at_s, Outcome.COMPLETED, clock(), clock(), num_tokens=4)


async def test_too_short_a_measurement_is_repeated_for_longer() -> None:
    spec = ClosedLoop(concurrency=2, ramp_s=0.0, measure_s=0.01)
    rate = await measure_throughput(slow, repeat(ARRIVAL), spec, min_completed=4, max_measure_s=1000.0)
    assert rate.tok_s == pytest.approx(4 * rate.req_s) and rate.req_s > 0


async def test_it_gives_up_at_its_longest() -> None:
    spec = ClosedLoop(concurrency=2, ramp_s=0.0, measure_s=0.01)
    with pytest.raises(RuntimeError, match=r"within the measured 0\.02 s"):
        await measure_throughput(slow, repeat(ARRIVAL), spec, min_completed=1, max_measure_s=0.03)
