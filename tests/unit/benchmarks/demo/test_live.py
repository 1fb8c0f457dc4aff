"""Live figures and the sampler that runs beside a replay."""

import asyncio

import pytest

from benchmarks.demo.live import RequestMonitor, every
from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.workloads.workload import Arrival
from tests.waiting import until_async

ARRIVAL = Arrival(at_s=0.0, prompt_ids=(1,), max_tokens=2, seed=0)


async def test_the_monitor_counts_and_forgets():
    monitor = RequestMonitor()
    outcomes = iter([Outcome.COMPLETED, Outcome.TIMEOUT])
    now_s = 1.0

    async def send(arrival, clock):
        assert monitor.num_sent == monitor.num_ended + 1
        return RequestRecord(0.0, 0.0, next(outcomes), first_token_s=0.5, last_token_s=0.6, num_tokens=2)

    watched = monitor.watch(send)
    await watched(ARRIVAL, lambda: now_s)
    assert monitor.progress(now_s, 9) == "1/9 answered, 0 open, 0 failed  TTFT p90 0.50 s"
    assert monitor.ttft_p90_s(now_s + 2.1) is None
    await watched(ARRIVAL, lambda: now_s)
    assert monitor.progress(now_s + 2.1, 9) == "2/9 answered, 0 open, 1 failed  TTFT p90 -"


async def test_every_samples_until_the_block_ends():
    times_s = []
    async with every(0.01, times_s.append):
        await until_async(lambda: len(times_s) >= 3)
    num_samples = len(times_s)
    assert times_s == sorted(times_s)
    await asyncio.sleep(0.05)
    assert len(times_s) == num_samples


async def test_a_failing_sample_raises_at_the_end():
    num_calls = 0

    def fail(at_s):
        nonlocal num_calls
        num_calls += 1
        raise RuntimeError("no status")

    with pytest.raises(RuntimeError, match="no status"):
        async with every(0.01, fail):
            await until_async(lambda: num_calls)
            await asyncio.sleep(0.05)
    assert num_calls == 1
