"""The streaming client against a real server: every way in which a request ends has its outcome."""

import asyncio
import socket
from itertools import count
from types import SimpleNamespace

import pytest

from benchmarks.loadgen import client as client_module
from benchmarks.loadgen.client import CompletionClient
from benchmarks.loadgen.record import Outcome
from benchmarks.workloads.workload import Arrival
from engine.types import BrownoutUsage

ARRIVAL = Arrival(at_s=0.0, prompt_ids=(5, 6, 7), max_tokens=8, seed=11)


async def send(url, model, timeout_s=60.0, arrival=ARRIVAL):
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    async with CompletionClient(url, model, timeout_s) as client:
        return await client.send(arrival, lambda: loop.time() - start_s)


async def test_a_completed_stream(completion_server):
    record = await send(completion_server.url, "complete")
    assert record.outcome is Outcome.COMPLETED and record.error is None
    assert (record.num_prompt_tokens, record.num_tokens) == (3, 8)
    assert record.brownout == BrownoutUsage(80, 20, level_peak=3, level_mean=1.5, setting_version=9)
    assert 0 <= record.sent_s <= record.first_token_s <= record.last_token_s
    assert completion_server.bodies == [
        {
            "model": "complete",
            "prompt": [5, 6, 7],
            "max_tokens": 8,
            "seed": 11,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_token_times_are_those_of_the_tokens(completion_server):
    """The clock counts how often it was looked at: at the send, at each token. Each look lets the next token come."""
    num_looks = 0

    def clock():
        nonlocal num_looks
        num_looks += 1
        completion_server.told.release()
        return num_looks

    async with CompletionClient(completion_server.url, "when_told", timeout_s=60) as client:
        record = await client.send(ARRIVAL, clock)
    assert (record.sent_s, record.first_token_s, record.last_token_s) == (1, 2, 3)


@pytest.mark.parametrize(
    ("model", "outcome", "error"),
    [
        ("busy", Outcome.REJECTED, "429"),
        ("unavailable", Outcome.REJECTED, "503"),
        ("broken", Outcome.HTTP_ERROR, "500"),
        ("missing", Outcome.HTTP_ERROR, "404"),
        ("error_event", Outcome.STREAM_ERROR, "the replica died"),
        ("cut", Outcome.DISCONNECTED, ""),
        ("no_done", Outcome.DISCONNECTED, "without [DONE]"),
        ("broken_json", Outcome.MALFORMED, "JSON"),
        ("no_usage", Outcome.MALFORMED, "no usage"),
        ("usage_without_counts", Outcome.MALFORMED, "prompt_tokens"),
    ],
)
async def test_failures_are_told_apart(completion_server, model, outcome, error):
    record = await send(completion_server.url, model)
    assert record.outcome is outcome
    assert error in record.error
    assert record.ttft_s == record.tpot_s == float("inf")


async def test_a_stalled_stream_times_out(completion_server, monkeypatch):
    """The time is up as soon as the first token is there."""
    loop, deadline = asyncio.get_running_loop(), asyncio.timeout(None)
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(timeout=lambda timeout_s: deadline))
    looks = count()

    def clock():
        look = next(looks)
        if look:
            deadline.reschedule(loop.time())
        return look

    async with CompletionClient(completion_server.url, "stall", timeout_s=60) as client:
        record = await client.send(ARRIVAL, clock)
    assert record.outcome is Outcome.TIMEOUT
    assert (record.sent_s, record.first_token_s) == (0, 1)


async def test_a_closed_port_is_a_disconnect():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        record = await send(f"http://127.0.0.1:{unused.getsockname()[1]}", "complete")
    assert record.outcome is Outcome.DISCONNECTED
