"""What the control plane promises when its parts die, hang, disagree or are cut off from each other."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

from controller.settings import SettingsStore
from engine.agent import TelemetryAgent
from engine.async_engine import AsyncEngine
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig
from engine.types import GenerationRequest, SamplingParams
from protos import control_pb2, control_pb2_grpc
from tests.integration.control_harness import CONFIG, MODEL, Cluster, TcpProxy
from tests.models import write_config
from tests.waiting import TIMEOUT_S, until_async

MEASURED = replace(MODEL, level_loss=(0.0, 0.1, 0.2, 0.3, 0.4))
SLEW_LEVELS = 1


async def lost_nats_s(cluster: Cluster) -> float:
    """What Redis knows that class "standard" lost."""
    async with Redis.from_url(cluster.redis.url) as redis:
        raw = await redis.hget("{brownoutserve:controller}:quality", "model")
    return sum(lost for _, lost in json.loads(raw)["accounts"]["standard"]) if raw else 0.0


async def test_killed_under_load_it_goes_on_where_it_was(cluster: Cluster) -> None:
    """SIGKILL while a law dims: levels never jump, versions and the budget's account go on."""
    config = {
        "tick_s": 0.05,
        "lease_s": 1.0,
        "slew_levels": SLEW_LEVELS,
        "law_params": {"check_interval_s": 0.1, "window_s": 0.5},
        "quality": {"standard": {"mean_loss_nats": 1.0}},
    }
    process = await cluster.start_controller_process("aimd", 0, **config)
    replicas = [await cluster.start_replica(name, MEASURED) for name in ("a", "b")]
    a, b = replicas
    for replica in replicas:
        replica.step_time_s = 0.5  # five times the TPOT objective
    await until_async(lambda: a.levels == b.levels == (4, 4))
    async with asyncio.timeout(TIMEOUT_S):
        while await lost_nats_s(cluster) == 0:
            await asyncio.sleep(0.05)
    before = a.setting
    process.kill()
    await process.wait()
    lost_before = await lost_nats_s(cluster)
    await until_async(lambda: not a.agent.connected and not b.agent.connected)
    num_received = len(a.received)
    await cluster.start_controller_process("aimd", 0, **config)
    await until_async(lambda: a.agent.connected and b.agent.connected)
    async with asyncio.timeout(TIMEOUT_S):
        while (lost_nats := await lost_nats_s(cluster)) == lost_before:
            await asyncio.sleep(0.02)
    assert lost_nats > lost_before, "the account was continued, not begun anew"
    a.step_time_s = b.step_time_s = 0.001
    await until_async(lambda: a.levels == b.levels == (0, 0))
    assert a.received[num_received].epoch == before.epoch + 1
    assert a.received[num_received].version > before.version
    for replica in replicas:
        for earlier, later in pairwise(replica.received):  # a replica that is busy gets the newest of several versions
            num_levels = abs(later.decode.floor - earlier.decode.floor)
            assert num_levels <= SLEW_LEVELS * (later.version - earlier.version)


async def test_without_redis_a_new_life_goes_on_from_what_replicas_follow(cluster: Cluster) -> None:
    """The controller and its Redis are both lost: the level that the replica has is where the law begins."""
    slow = replace(CONFIG, law="aimd", level=0, slew_levels=SLEW_LEVELS, law_params={"check_interval_s": 0.2})
    first = await cluster.start_controller(slow)
    a = await cluster.start_replica("a", MEASURED)
    a.step_time_s = 0.5
    await until_async(lambda: a.levels == (4, 4))
    before = a.setting
    cluster.redis.stop()
    await first.stop()
    await cluster.start_controller(slow)
    await until_async(lambda: a.setting.epoch > before.epoch)
    first_of_new_life = next(setting for setting in a.received if setting.epoch > before.epoch)
    assert abs(first_of_new_life.decode.floor - 4) <= SLEW_LEVELS


async def test_a_replica_cut_off_runs_on_its_safe_policy_and_rejoins(cluster: Cluster, tmp_path: Path) -> None:
    """A whole engine behind a proxy that stops passing anything on."""
    service = await cluster.start_controller(replace(CONFIG, level=2, allow_unmeasured=True))
    brownout = BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)
    model = ModelConfig(str(write_config(tmp_path / "tiny")), load_format="random")
    engine = await AsyncEngine.start(EngineConfig(model, CacheConfig(num_blocks=64), brownout=brownout))
    async with TcpProxy(service.address) as proxy:

        async def address() -> str:
            return proxy.address

        agent = TelemetryAgent(
            address_provider=address,
            replica_id="a",
            model_info=engine.info,
            on_setting=engine.apply_setting,
            take_window=engine.take_window,
            period_s=0.05,
        )
        await agent.start()
        await until_async(lambda: engine.stats().setting_version > 0 and not engine.stats().lease_expired)
        proxy.cut()
        await until_async(lambda: engine.stats().lease_expired)
        setting = engine._engine.brownout.setting(time.monotonic())
        assert (setting.law, setting.decode.floor, setting.decode.ceiling) == ("safe", 0, 2)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        outputs = [output async for output in engine.generate(GenerationRequest("r", (1, 2, 3), params))]
        assert outputs[-1].finished, "it serves on"
        replicas = lambda: service.status()["models"]["tiny"]["replicas"]  # noqa: E731
        await until_async(lambda: not replicas() or replicas()["a"]["stale"])
        proxy.heal()
        await until_async(lambda: not engine.stats().lease_expired and agent.connected)
        await until_async(lambda: "a" in replicas() and not replicas()["a"]["stale"])
        assert not replicas()["a"]["quarantined"], "late windows are no fault"
        await agent.stop()
    await engine.stop()


@pytest.mark.parametrize("clock_ahead_s", [-1e7, 1e7])
async def test_hosts_clocks_do_not_matter(cluster: Cluster, clock_ahead_s: float) -> None:
    """Four months ahead or behind: no time of a replica is ever compared with one of the controller."""
    service = await cluster.start_controller(replace(CONFIG, law="aimd", law_params={"check_interval_s": 0.2}))
    a = await cluster.start_replica("a")
    skewed = await cluster.start_replica("skewed", clock_ahead_s=clock_ahead_s)
    a.step_time_s = skewed.step_time_s = 0.5
    await until_async(lambda: a.levels == skewed.levels == (4, 4))

    def both(key: str) -> list[float]:
        replicas = service.status()["models"]["model"]["replicas"]
        return [replicas[name][key] for name in ("a", "skewed")]

    def evidence_age_s() -> float:
        age_s: float = service.status()["models"]["model"]["observation"]["evidence_age_s"]
        return age_s

    await until_async(lambda: both("stale") == [False, False])
    await until_async(lambda: all(0 < left_s <= CONFIG.lease_s for left_s in both("lease_left_s")))
    await until_async(lambda: all(0 <= age_s <= CONFIG.stale_s for age_s in both("last_window_age_s")))
    await until_async(lambda: 0 <= evidence_age_s() <= CONFIG.stale_s)
    await until_async(lambda: a.setting.version == skewed.setting.version)


async def test_of_two_controllers_the_older_stands_down(cluster: Cluster) -> None:
    older = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    newer = await cluster.start_controller(replace(CONFIG, level=3))
    b = await cluster.start_replica("b")
    await until_async(lambda: b.levels == (3, 3))
    await until_async(lambda: older.superseded)
    await until_async(lambda: a.levels == (3, 3))
    assert a.setting.epoch == newer.status()["epoch"] == older.status()["epoch"] + 1
    assert older.status()["superseded"] and not newer.status()["superseded"]


async def test_a_controller_overtaken_while_it_starts_does_not_begin(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = SettingsStore.claim_epoch

    async def claim_before_another_does(store: SettingsStore, above: int) -> int:
        epoch = await claim(store, above)
        await claim(store, above)
        return epoch

    with monkeypatch.context() as patch:
        patch.setattr(SettingsStore, "claim_epoch", claim_before_another_does)
        with pytest.raises(OSError, match="newer controller"):
            await cluster.start_controller()
    await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    assert a.setting.epoch == 3


async def test_an_older_controller_cut_off_from_redis_gets_nobody_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot know that it is the older one, but a replica that has followed the newer shows it."""
    monkeypatch.setattr("controller.settings.TIMEOUT_S", 1.0)
    place = cluster.redis.url.rsplit("@", 1)
    async with TcpProxy(place[1].split("/")[0]) as proxy:
        older = await cluster.start_controller(redis_url=f"{place[0]}@{proxy.address}/0")
        old_address = cluster.address
        a = await cluster.start_replica("a")
        await until_async(lambda: a.levels == (1, 1) and older.status()["redis_ok"])
        proxy.cut()
        await cluster.start_controller(replace(CONFIG, level=3))
        b = await cluster.start_replica("b")
        await until_async(lambda: b.levels == (3, 3))
        epoch = b.setting.epoch
        cluster.address = old_address
        async with grpc.aio.insecure_channel(old_address) as channel:
            call = control_pb2_grpc.ControlStub(channel).Stream()
            hello = control_pb2.Hello(
                replica_id="b", model_id="model", incarnation=1, num_levels=5, ladder_measured=True, applied_epoch=epoch
            )
            await call.write(control_pb2.ReplicaMessage(hello=hello))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert b.setting.epoch == epoch
        proxy.heal()
        await until_async(lambda: older.superseded)


class Replayer(control_pb2_grpc.ControlServicer):
    """A controller that sends one setting, whatever the replica has."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self.num_streams = 0

    async def Stream(self, messages, context):  # type: ignore[no-untyped-def]
        self.num_streams += 1
        phases = [control_pb2.PhaseSetting(phase=phase, ceiling=2, budget_s=1, margin=1) for phase in (1, 2)]
        setting = control_pb2.BrownoutSetting(epoch=self._epoch, version=1, lease_s=9, model_id="model", phases=phases)
        await context.write(control_pb2.ControllerMessage(setting=setting))
        await asyncio.Event().wait()


async def test_a_replica_leaves_a_controller_that_is_behind(cluster: Cluster) -> None:
    await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    before, good_address = a.setting, cluster.address
    replayer, server = Replayer(epoch=0), grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(replayer, server)
    cluster.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await cluster.services[0].stop()
    await until_async(lambda: replayer.num_streams >= 2)
    assert a.setting == before and not a.agent.connected
    cluster.address = good_address
    await cluster.start_controller(replace(CONFIG, level=2))
    await until_async(lambda: a.levels == (2, 2))
    await server.stop(None)
