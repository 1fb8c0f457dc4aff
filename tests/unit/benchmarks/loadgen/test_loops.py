"""Open and closed loops: who waits for whom."""

import asyncio
from dataclasses import replace
from itertools import count

import pytest

from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.closed_loop import ClosedLoop, run_closed_loop, throughput
from benchmarks.loadgen.open_loop import run_open_loop
from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.workloads.workload import Arrival
from tests.waiting import until_async


def arrivals(times_s):
    return [Arrival(at_s, (1, 2), max_tokens=4, seed=0) for at_s in times_s]


def record_at(at_s, last_token_s, num_tokens=10, outcome=Outcome.COMPLETED):
    return RequestRecord(at_s, at_s, outcome, at_s, last_token_s, num_tokens=num_tokens, error="why")


async def test_open_loop_does_not_wait_for_answers(completion_server):
    async with CompletionClient(completion_server.url, "when_told", timeout_s=60) as client:
        loop = asyncio.create_task(run_open_loop(client.send, arrivals([0.0, 0.02, 0.04])))
        await until_async(lambda: len(completion_server.bodies) == 3)
        for _ in range(6):
            completion_server.told.release()
        records = await loop
    assert [r.scheduled_s for r in records] == [0.0, 0.02, 0.04]
    assert all(r.completed for r in records)
    assert max(r.sent_s for r in records) < min(r.first_token_s for r in records)


async def test_a_late_send_counts_as_latency():
    """A client kept busy past the schedule must not hide the wait: no coordinated omission."""
    blocked = asyncio.Event()

    async def send(arrival, clock):
        if not blocked.is_set():
            blocked.set()
            while clock() < 0.2:  # holds the event loop, as an overloaded client would
                pass
        now_s = clock()
        return RequestRecord(arrival.at_s, now_s, Outcome.COMPLETED, now_s, now_s, num_tokens=1)

    late = (await run_open_loop(send, arrivals([0.0, 0.05])))[1]
    assert late.sent_s >= 0.2
    assert late.ttft_s >= 0.15


async def test_open_loop_ends_though_nothing_answers(completion_server):
    async with CompletionClient(completion_server.url, "stall", timeout_s=0.2) as client:
        records = await run_open_loop(client.send, arrivals([0.0, 0.01]))
    assert [r.outcome for r in records] == [Outcome.TIMEOUT] * 2


async def test_closed_loop_holds_its_concurrency(completion_server):
    """All clients' first requests wait for each other; after ten answers every client is failed, which ends it."""
    running, peak, num_answers = 0, 0, 0

    async with CompletionClient(completion_server.url, "complete", timeout_s=60) as client:

        async def send(arrival, clock):
            nonlocal running, peak, num_answers
            running += 1
            peak = max(peak, running)
            await until_async(lambda: peak >= 3)
            record = await client.send(arrival, clock)
            running -= 1
            num_answers += 1
            return record if num_answers <= 10 else replace(record, outcome=Outcome.TIMEOUT, error="enough")

        loop_spec = ClosedLoop(concurrency=3, ramp_s=0.03, measure_s=3600)
        requests = (Arrival(0.0, (n + 1,), 4, 0) for n in count())
        records = await run_closed_loop(send, requests, loop_spec)
    assert peak == 3 and running == 0
    assert (len(records), sum(r.completed for r in records)) == (13, 10)
    in_order = sorted(records, key=lambda record: record.scheduled_s)
    assert all(r.scheduled_s <= r.sent_s for r in records)
    # Who is asked again is scheduled then, and not with the first ones.
    assert in_order[-1].scheduled_s >= min(r.last_token_s for r in records)


async def test_closed_loop_clients_stop_at_a_failure(completion_server):
    async with CompletionClient(completion_server.url, "busy", timeout_s=60) as client:
        loop_spec = ClosedLoop(concurrency=2, ramp_s=0.0, measure_s=3600)
        records = await run_closed_loop(client.send, iter(arrivals([0.0] * 100)), loop_spec)
    assert [r.outcome for r in records] == [Outcome.REJECTED] * 2
    with pytest.raises(RuntimeError, match=r"2 of 2 requests failed.*429"):
        throughput(records, loop_spec)


def test_throughput_counts_completions_of_the_measured_part():
    loop_spec = ClosedLoop(concurrency=1, ramp_s=2.0, measure_s=4.0)
    records = [record_at(0, 1.9), record_at(1, 2.0), record_at(3, 5.9), record_at(4, 6.0)]
    rate = throughput(records, loop_spec)
    assert (rate.req_s, rate.tok_s) == (2 / 4, 20 / 4)
    with pytest.raises(RuntimeError, match="no request was completed"):
        throughput(records[:1], loop_spec)
