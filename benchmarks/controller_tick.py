"""What one controller tick costs with many replicas, and whether its memory stays flat over an hour of virtual time.

The live code throughout: reports as bytes, parsed and checked as on the control stream, folded into the window, then
one tick of guard, law and numbering. Time is this process's CPU time; the clock that the controller sees is virtual.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.report import percentile
from benchmarks.results import RESULTS, write_result
from controller.config import ControllerConfig
from controller.model_control import ModelControl, Policy
from controller.reports import Hello, StepWindow
from controller.wire import read_window
from engine.config import SloConfig
from engine.telemetry import StepRecord, TelemetryRecorder
from engine.types import EngineStats, Levels, ServiceClass
from engine.wire import window_to_proto
from protos import telemetry_pb2

NUM_LEVELS = 6
MODEL_ID = "model"
TICK_S = 0.25
STEPS_PER_REPORT = 20  # of an H100 replica in a quarter of a second
REQUESTS_PER_REPORT = 8
NUM_TEMPLATES = 16
HOUR_S = 3600.0
HOUR_REPLICAS = 4


@dataclass(slots=True)
class Fleet:
    """Replicas that report; ``control`` is the controller's side of one model."""

    control: ModelControl
    hellos: list[Hello]
    templates: list[telemetry_pb2.StepWindow]

    @staticmethod
    def of(num_replicas: int, seed: int) -> Fleet:
        control = ModelControl(MODEL_ID, ControllerConfig(), Policy("predictive"), epoch=1)
        losses = tuple(0.04 * level for level in range(NUM_LEVELS))
        hellos = [Hello(f"r{i}", MODEL_ID, 1, NUM_LEVELS, True, level_loss=losses) for i in range(num_replicas)]
        for hello in hellos:
            control.join(hello, 0.0)
        rng = random.Random(seed)
        return Fleet(control, hellos, [_report(rng) for _ in range(NUM_TEMPLATES)])

    def messages(self, sequence: int) -> list[bytes]:
        """One report of every replica, as it comes from the wire."""
        messages = []
        for index, hello in enumerate(self.hellos):
            message = self.templates[(index + sequence) % NUM_TEMPLATES]
            message.replica_id, message.sequence = hello.replica_id, sequence
            messages.append(message.SerializeToString())
        return messages

    def read(self, messages: Sequence[bytes]) -> list[StepWindow]:
        """Parsed and checked, as each stream does with its own."""
        pairs = zip(self.hellos, messages, strict=True)
        return [read_window(telemetry_pb2.StepWindow.FromString(text), hello) for hello, text in pairs]

    def step(self, windows: Sequence[StepWindow], now_s: float) -> None:
        """What a tick costs: the reports since the last one folded in, then the decision."""
        for window in windows:
            self.control.window.offer(window, now_s)
        self.control.tick(now_s)


def _report(rng: random.Random) -> telemetry_pb2.StepWindow:
    recorder = TelemetryRecorder(SloConfig())
    for _ in range(STEPS_PER_REPORT):
        level, num_prefill = rng.randrange(NUM_LEVELS), rng.choice((0, rng.randint(1, 500)))
        step_s = rng.lognormvariate(-4.4, 0.2)
        recorder.record_step(
            StepRecord(num_prefill, rng.randint(1, 128), Levels(level, level), step_s, step_s * rng.uniform(0.9, 1.1))
        )
    for _ in range(REQUESTS_PER_REPORT):
        ttft_s = rng.lognormvariate(-2, 0.7)
        recorder.record_first_token(ServiceClass.STANDARD, ttft_s, ttft_s / 2)
        recorder.record_finish(ServiceClass.STANDARD, rng.lognormvariate(-4.4, 0.2))
    stats = EngineStats(num_running=64, max_num_seqs=128, levels=Levels(1, 1), kv_used_frac=0.4)
    window = recorder.drain(stats, TICK_S, predicted_step_time_s=(0.012,) * NUM_LEVELS)
    message = window_to_proto(window)
    message.model_id, message.incarnation = MODEL_ID, 1
    return message


def time_ticks(num_replicas: int, num_ticks: int, seed: int) -> dict[str, float | None]:
    """Milliseconds of CPU of a tick: one report of each replica folded in, and the decision; and of reading them."""
    fleet = Fleet.of(num_replicas, seed)
    read_ms, tick_ms = [], []
    for tick in track(range(1, num_ticks + 1), description=f"{num_replicas} replicas", transient=True):
        messages, now_s = fleet.messages(tick), tick * TICK_S
        start_s = time.process_time()
        windows = fleet.read(messages)
        read_s = time.process_time()
        fleet.step(windows, now_s)
        read_ms.append((read_s - start_s) * 1e3)
        tick_ms.append((time.process_time() - read_s) * 1e3)
    return {
        "tick_p50_ms": percentile(tick_ms, 50),
        "tick_p90_ms": percentile(tick_ms, 90),
        "tick_max_ms": max(tick_ms),
        "read_p50_ms": percentile(read_ms, 50),
    }


def memory_by_quarter(seed: int) -> list[int]:
    """Blocks of memory that Python holds after each quarter of an hour of virtual time."""
    fleet = Fleet.of(HOUR_REPLICAS, seed)
    num_ticks = int(HOUR_S / TICK_S)
    held = []
    for tick in track(range(1, num_ticks + 1), description="an hour of virtual time", transient=True):
        fleet.step(fleet.read(fleet.messages(tick)), tick * TICK_S)
        if tick % (num_ticks // 4) == 0:
            gc.collect()
            held.append(sys.getallocatedblocks())
    return held


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.controller_tick", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="leave the hour of virtual time out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    figures = time_ticks(arguments.replicas, arguments.ticks, arguments.seed)
    held = [] if arguments.no_memory else memory_by_quarter(arguments.seed)
    write_result(
        arguments.out / "controller_tick.json",
        {"seed": arguments.seed, "replicas": arguments.replicas, **figures, "memory_blocks_by_quarter_hour": held},
    )
    console = Console()
    console.print(f"{arguments.replicas} replicas, CPU ms: " + ", ".join(f"{k} {v:.1f}" for k, v in figures.items()))
    console.print(f"memory blocks held after each quarter of an hour, {HOUR_REPLICAS} replicas: {held}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
