"""Controllers, replicas without engines, and a Redis, over real sockets; and a proxy that can cut them off."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.local.redis_server import RedisServer
from controller.config import ControllerConfig
from controller.service import ControllerService
from engine.agent import TelemetryAgent
from engine.config import SloConfig
from engine.telemetry import StepRecord, StepWindow, TelemetryRecorder
from engine.types import BrownoutSetting, EngineStats, Levels, ModelInfo, ServiceClass

PATIENCE_S = 60.0
MODEL = ModelInfo("model", 1000, 512, 64, 16, num_levels=5, ladder_measured=True)
CONFIG = ControllerConfig(law="static", level=1, tick_s=0.05, lease_s=1.0)


class Replica:
    """A replica without an engine: a real recorder and a real agent, and a list of what it was told."""

    def __init__(
        self,
        replica_id: str,
        address: Callable[[], str],
        model: ModelInfo = MODEL,
        clock_ahead_s: float = 0.0,
        **agent: Any,
    ) -> None:
        self._clock_ahead_s = clock_ahead_s
        self.recorder = TelemetryRecorder(SloConfig(), self._now_s())
        self.losses = model.level_loss
        self.received: list[BrownoutSetting] = []
        self.step_time_s = 0.01
        self._address = address
        self.agent = TelemetryAgent(
            address_provider=self._find_controller,
            replica_id=replica_id,
            model_info=model,
            on_setting=self._apply,
            take_window=self._take_window,
            period_s=0.05,
            **agent,
        )

    def _now_s(self) -> float:
        return time.monotonic() + self._clock_ahead_s

    @property
    def setting(self) -> BrownoutSetting:
        return self.received[-1]

    @property
    def levels(self) -> tuple[int, int] | None:
        return (self.setting.decode.floor, self.setting.decode.ceiling) if self.received else None

    async def _find_controller(self) -> str:
        return self._address()

    def _apply(self, setting: BrownoutSetting) -> bool:
        if self.received and self.received[-1].newer_than(setting):
            return False
        self.received.append(setting)
        return True

    def _take_window(self) -> StepWindow:
        level = self.setting.decode.floor if self.received else 0
        spent = {ServiceClass.STANDARD: (4, 4 * self.losses[level])} if self.losses else {}
        step = StepRecord(0, 4, Levels(decode=level), self.step_time_s, routed_pairs=16, spent=spent)
        self.recorder.record_step(step)
        self.recorder.record_first_token(ServiceClass.STANDARD, 0.1, 0.01)
        self.recorder.record_finish(ServiceClass.STANDARD, self.step_time_s)
        stats = EngineStats(num_running=4, num_waiting=2, kv_used_frac=0.25, levels=Levels(decode=level))
        return self.recorder.drain(stats, self._now_s())


class Cluster:
    """What a test started, and the address under which replicas look for the controller."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.address = "127.0.0.1:1"
        self.services: list[ControllerService] = []
        self.replicas: list[Replica] = []
        self.processes: list[asyncio.subprocess.Process] = []

    async def start_controller(self, config: ControllerConfig = CONFIG, redis_url: str = "") -> ControllerService:
        service = ControllerService(config, redis_url or self.redis.url)
        self.address = await service.start()
        self.services.append(service)
        return service

    async def start_controller_process(self, law: str, level: int, **config: Any) -> asyncio.subprocess.Process:
        """``config``: further fields of ControllerConfig."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.integration.controller_process",
            self.redis.url,
            json.dumps({"law": law, "level": level, **config}),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        self.processes.append(process)
        assert process.stdout is not None
        self.address = (await process.stdout.readline()).decode().strip()
        return process

    async def start_replica(self, replica_id: str, model: ModelInfo = MODEL, **options: Any) -> Replica:
        replica = Replica(replica_id, lambda: self.address, model, **options)
        self.replicas.append(replica)
        await replica.agent.start()
        return replica

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.agent.stop()
        for service in self.services:
            await service.stop()
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


def make_patient(patch: pytest.MonkeyPatch) -> None:
    """Let controllers of this process wait for their Redis, however busy the machine is: an epoch claimed by a call
    that timed out is skipped, and lives are not numbered one by one. A Redis that is killed is noticed all the same.
    """
    patch.setattr("controller.service.RESTORE_TIMEOUT_S", PATIENCE_S)
    patch.setattr("controller.settings.TIMEOUT_S", PATIENCE_S)


class TcpProxy:
    """Passes bytes on to ``target``; once cut, it keeps connections open and lets nothing through: a lost route."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._passing.clear()

    def heal(self) -> None:
        self._passing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passing.wait()
        target_reader, target_writer = await asyncio.open_connection(self._host, self._port)
        for source, sink in ((reader, target_writer), (target_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
