"""One replica's control stream: what it may not say, when it is closed, and what its agent survives."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import pytest

from engine.agent import TelemetryAgent
from engine.config import SloConfig
from engine.telemetry import StepWindow, TelemetryRecorder
from engine.types import BrownoutSetting, EngineStats
from protos import control_pb2, control_pb2_grpc, telemetry_pb2
from tests.integration.control_harness import MODEL, Cluster
from tests.waiting import until_async


async def test_nothing_that_goes_wrong_in_a_replica_ends_its_agent(cluster: Cluster) -> None:
    await cluster.start_controller()
    num_calls = {"address": 0, "window": 0, "setting": 0}

    def fails_twice(what: str) -> None:
        num_calls[what] += 1
        if num_calls[what] <= 2:
            raise RuntimeError(f"no {what} yet")

    async def address() -> str:
        fails_twice("address")
        return cluster.address

    def take_window() -> StepWindow:
        fails_twice("window")
        return TelemetryRecorder(SloConfig()).drain(EngineStats(), 0.25)

    def on_setting(setting: BrownoutSetting) -> bool:
        fails_twice("setting")
        return True

    agent = TelemetryAgent(
        address_provider=address,
        replica_id="a",
        model_info=MODEL,
        on_setting=on_setting,
        take_window=take_window,
        period_s=0.05,
    )
    await agent.start()
    await until_async(lambda: agent.connected and min(num_calls.values()) >= 3)
    await agent.stop()


async def test_an_agent_is_stopped_while_it_leaves_a_stream(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream's end waits for the reporter's; a stop that comes just then is not lost."""
    leaving, may_leave = asyncio.Event(), asyncio.Event()
    report = TelemetryAgent._report

    async def slow_to_end(agent: TelemetryAgent, call: Any) -> None:
        try:
            await report(agent, call)
        finally:
            leaving.set()
            await may_leave.wait()

    monkeypatch.setattr(TelemetryAgent, "_report", slow_to_end)
    service = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.agent.connected)
    await service.stop()
    await asyncio.wait_for(leaving.wait(), 120)
    stopping = asyncio.create_task(a.agent.stop())
    await asyncio.sleep(0)
    may_leave.set()
    await asyncio.wait_for(stopping, 120)


def window(sequence: int, incarnation: int = 1, **fields: object) -> control_pb2.ReplicaMessage:
    sound = {"replica_id": "raw", "model_id": "model", "window_s": 0.25, "num_running": sequence}
    return control_pb2.ReplicaMessage(
        window=telemetry_pb2.StepWindow(**{**sound, "sequence": sequence, "incarnation": incarnation, **fields})
    )


HELLO = control_pb2.ReplicaMessage(
    hello=control_pb2.Hello(replica_id="raw", model_id="model", incarnation=1, num_levels=5, ladder_measured=True)
)


async def test_garbage_is_refused_and_the_stream_goes_on(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    await cluster.start_replica("a")
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        call = control_pb2_grpc.ControlStub(channel).Stream()
        await call.write(HELLO)
        first = await call.read()
        assert first.setting.version >= 1
        await call.write(window(1, window_s=math.nan))
        await call.write(window(2, oldest_wait_s=-1.0))
        await call.write(window(3, replica_id="a"))
        await call.write(HELLO)
        await call.write(control_pb2.ReplicaMessage())
        await call.write(window(4))
        await call.write(window(4))
        await call.write(window(3))
        await call.write(window(5, incarnation=2))

        def model() -> dict[str, object]:
            return service.status()["models"]["model"]

        await until_async(lambda: model()["num_windows"]["out_of_order"] == 1)
        await until_async(lambda: model()["replicas"]["raw"]["num_refused"] == 6)
        assert (model()["num_windows"]["duplicate"], model()["num_windows"]["nonsense"]) == (1, 6)
        assert model()["replicas"]["raw"]["quarantined"]
        await until_async(lambda: model()["observation"]["num_quarantined"] == 1)
        for sequence in range(5, 60):
            await call.write(window(sequence))
        await until_async(lambda: not model()["replicas"]["raw"]["quarantined"])
        await until_async(lambda: model()["replicas"]["raw"]["num_running"] == 59)
        assert (await call.read()).setting.epoch == 1
        call.cancel()
    await until_async(lambda: list(model()["replicas"]) == ["a"])
    other = model()["replicas"]["a"]
    assert (other["num_refused"], other["quarantined"]) == (0, False)


@pytest.mark.parametrize(
    "first",
    [
        window(1),
        control_pb2.ReplicaMessage(),
        control_pb2.ReplicaMessage(hello=control_pb2.Hello(replica_id="raw", model_id="model")),
    ],
)
async def test_a_stream_without_a_sound_hello_is_closed(cluster: Cluster, first: control_pb2.ReplicaMessage) -> None:
    await cluster.start_controller()
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        call = control_pb2_grpc.ControlStub(channel).Stream()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.write(first)
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_newer_stream_of_a_replica_replaces_the_older(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        older, newer = stub.Stream(), stub.Stream()
        for call in (older, newer):
            await call.write(HELLO)
            await call.read()
        older.cancel()
        await newer.write(window(1))
        await until_async(lambda: service.status()["models"]["model"]["replicas"]["raw"]["num_running"] == 1)
        await service.set_policy("static", level=4)
        while (await newer.read()).setting.phases[1].floor != 4:
            pass
        newer.cancel()


async def test_a_replica_whose_host_vanished_is_forgotten(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    service = await cluster.start_controller()
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        call = control_pb2_grpc.ControlStub(channel).Stream()
        await call.write(HELLO)
        await call.read()
        assert "raw" in service.status()["models"]["model"]["replicas"]
        monkeypatch.setattr("controller.streams.MAX_SILENCE_S", 1.0)  # from its next message on
        await call.write(window(1))
        await until_async(lambda: service.status()["models"]["model"]["replicas"] == {})
        call.cancel()
