"""Open loop: requests are sent when they are due, however many are still being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.loadgen.record import RequestRecord, Send
from benchmarks.workloads.workload import Arrival


async def run_open_loop(send: Send, arrivals: Sequence[Arrival]) -> list[RequestRecord]:
    """Sends every arrival at its time and waits for all; records come in order of arrival."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()

    def clock() -> float:
        return loop.time() - start_s

    async with asyncio.TaskGroup() as group:
        tasks = []
        for arrival in arrivals:
            delay_s = arrival.at_s - clock()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(group.create_task(send(arrival, clock)))
    return [task.result() for task in tasks]
