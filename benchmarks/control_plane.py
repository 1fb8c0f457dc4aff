"""What telemetry costs a replica, and how fast the control streams are back after the controller was killed.

    python -m benchmarks.control_plane

Telemetry: a real recorder and a real agent stream 10 messages/s to a controller in another process, under a synthetic
engine's load; the share of one core is this process's CPU time, less that of the idle loop. Restart: SIGKILL, a new
controller on another port, and the time from its listening until every agent has a setting again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.results import RESULTS, markdown_table, result_file, write_result
from cluster.local.redis_server import RedisServer
from engine.agent import TelemetryAgent
from engine.config import SloConfig
from engine.telemetry import ExpertLoad, StepRecord, StepWindow, TelemetryRecorder
from engine.types import BrownoutSetting, EngineStats, Levels, ModelInfo, ServiceClass
from engine.wire import window_to_proto

NUM_LEVELS, NUM_LAYERS = 8, 24
MESSAGES_S = 10.0
LOSSES = tuple(0.01 * level for level in range(NUM_LEVELS))
MODEL = ModelInfo(
    "model", 150_000, 8192, 4096, 16, num_levels=NUM_LEVELS, ladder_measured=True, level_loss=LOSSES, max_num_seqs=256
)
EXPERTS = ExpertLoad(
    layer=tuple(range(NUM_LAYERS)),
    active_experts=(41.5,) * NUM_LAYERS,
    balance_index=(0.6,) * NUM_LAYERS,
    num_hot=4,
    hot_expert=(7, 3, 11, 59) * NUM_LAYERS,
    hot_share=(0.09, 0.08, 0.05, 0.04) * NUM_LAYERS,
)
CONTROLLER = """
import asyncio, sys
from controller.config import ControllerConfig
from controller.service import ControllerService
async def main():
    print(await ControllerService(ControllerConfig(), sys.argv[1]).start(), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class SyntheticReplica:
    """Records what an engine under load would: ``steps_s`` steps and ``requests_s`` requests per second."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)  # drawn beforehand: what an engine measures costs the telemetry nothing
        self._steps = cycle([(draw.choice((0, 0, 256)), draw.uniform(0.005, 0.02)) for _ in range(1000)])
        self._requests = cycle([(draw.expovariate(20), draw.uniform(0.01, 0.03)) for _ in range(1000)])
        self.recorder = TelemetryRecorder(SloConfig(), time.monotonic())
        self._num_windows = 0

    def record_step(self) -> None:
        spent = {ServiceClass.STANDARD: (60, 1.2), ServiceClass.FULL: (4, 0.0)}
        prefill, time_s = next(self._steps)
        step = StepRecord(prefill, 64, Levels(1, 2), time_s, 0.01, routed_pairs=6144, dimmed_pairs=900, spent=spent)
        self.recorder.record_step(step)

    def record_request(self) -> None:
        waited_s, tpot_s = next(self._requests)
        self.recorder.record_first_token(ServiceClass.STANDARD, waited_s + 0.05, waited_s)
        self.recorder.record_finish(ServiceClass.STANDARD, tpot_s)

    def take_window(self) -> StepWindow:
        self._num_windows += 1
        if self._num_windows % 10 == 1:  # an engine tells once a second
            self.recorder.record_experts(EXPERTS)
        stats = EngineStats(64, 5, 256, queued_prefill_tokens=800, oldest_wait_s=0.2, kv_used_frac=0.5)
        return self.recorder.drain(stats, time.monotonic(), predicted_step_time_s=tuple(0.01 for _ in LOSSES))

    def on_setting(self, setting: BrownoutSetting) -> bool:
        return True


class ControllerProcess:
    """A controller that can be killed."""

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self) -> None:
        """Return once it listens."""
        command = [sys.executable, "-c", CONTROLLER, self._redis_url]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def agent_of(replica: SyntheticReplica, name: str, controller: ControllerProcess, period_s: float) -> TelemetryAgent:
    async def address() -> str:
        return controller.address

    return TelemetryAgent(
        address_provider=address,
        replica_id=name,
        model_info=MODEL,
        on_setting=replica.on_setting,
        take_window=replica.take_window,
        period_s=period_s,
    )


async def measure_telemetry(
    controller: ControllerProcess, steps_s: int, requests_s: int, duration_s: float, seed: int
) -> float:
    """Share of one core that recording and reporting take."""
    replica = SyntheticReplica(seed)
    agent = agent_of(replica, "a", controller, 1 / MESSAGES_S)

    async def load(seconds: float, records: bool) -> float:
        """CPU seconds of a loop that wakes for every step; with ``records``, telemetry is recorded in it."""
        cpu_s, end_s = time.process_time(), time.monotonic() + seconds
        num_steps = 0
        while time.monotonic() < end_s:
            await asyncio.sleep(1 / steps_s)
            num_steps += 1
            if records:
                replica.record_step()
                if num_steps % max(steps_s // requests_s, 1) == 0:
                    replica.record_request()
        return time.process_time() - cpu_s

    loop_s = await load(duration_s, records=False)
    await agent.start()
    await until(lambda: agent.connected)
    busy_s = await load(duration_s, records=True)
    await agent.stop()
    return (busy_s - loop_s) / duration_s


def typical_message_bytes(steps_s: int, requests_s: int, seed: int) -> int:
    """Length of a report without the experts' load, which is in every tenth."""
    replica = SyntheticReplica(seed)
    replica.take_window()
    for _ in range(round(steps_s / MESSAGES_S)):
        replica.record_step()
    for _ in range(round(requests_s / MESSAGES_S)):
        replica.record_request()
    return len(window_to_proto(replica.take_window()).SerializeToString())


async def measure_restart(controller: ControllerProcess, num_replicas: int, seed: int) -> dict[str, float]:
    """Seconds from the new controller's listening until the streams are back."""
    replicas = [SyntheticReplica(seed + i) for i in range(num_replicas)]
    agents = [agent_of(replica, f"r{i}", controller, 0.25) for i, replica in enumerate(replicas)]
    for agent in agents:
        await agent.start()
    await until(lambda: all(agent.connected for agent in agents))
    controller.kill()
    await until(lambda: not any(agent.connected for agent in agents))
    await asyncio.to_thread(controller.start)
    listening_s = time.monotonic()
    back_s: dict[int, float] = {}
    while len(back_s) < num_replicas:
        for number, agent in enumerate(agents):
            if agent.connected:
                back_s.setdefault(number, time.monotonic() - listening_s)
        await asyncio.sleep(0.002)
    for agent in agents:
        await agent.stop()
    return {"streams_back_mean_s": fmean(back_s.values()), "streams_back_max_s": max(back_s.values())}


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as redis:
        controller = ControllerProcess(redis.url)
        controller.start()
        try:
            shares = [
                await measure_telemetry(controller, args.steps_s, args.requests_s, args.duration_s, args.seed)
                for _ in range(args.repeats)
            ]
            restart = await measure_restart(controller, args.restart_replicas, args.seed)
        finally:
            controller.kill()
    telemetry = {
        "core_share_median": median(shares),
        "core_share_min": min(shares),
        "core_share_max": max(shares),
        "bytes_per_message": float(typical_message_bytes(args.steps_s, args.requests_s, args.seed)),
    }
    return {"telemetry": telemetry, "restart": restart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps-s", type=int, default=100, help="engine steps per second")
    parser.add_argument("--requests-s", type=int, default=20, help="requests per second")
    parser.add_argument("--duration-s", type=float, default=10.0, help="how long telemetry is measured, each time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--restart-replicas", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=result_file, default=RESULTS / "control_plane.json")
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    setup = {key: value for key, value in vars(args).items() if key != "out"}
    write_result(args.out, {"setup": setup, **figures})
    rows = [[part, name, f"{value:.4g}"] for part, values in figures.items() for name, value in values.items()]
    print(
        f"seed {args.seed}; {MESSAGES_S:g} messages/s, {args.steps_s} steps/s, {args.requests_s} requests/s; "
        f"{args.restart_replicas} replicas at the restart"
    )
    print(markdown_table(("part", "figure", "value"), rows))
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
