"""Replicas, controller and Redis over real sockets: settings arrive, and every one of the three may die."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest

from controller.laws.base import LawError
from controller.ledger import DecisionLedger
from controller.reports import Hello
from controller.service import ControllerService
from controller.sketch import RELATIVE_ERROR as CONTROLLER_RELATIVE_ERROR
from controller.types import Phase as ControllerPhase
from controller.wire import read_window
from engine.config import SloConfig
from engine.sketch import RELATIVE_ERROR
from engine.telemetry import ExpertLoad, StepRecord, TelemetryRecorder
from engine.types import EngineStats, Levels, ServiceClass
from engine.wire import window_to_proto
from tests.integration.control_harness import CONFIG, MODEL, Cluster
from tests.waiting import until_async


def test_both_ends_sketch_alike() -> None:
    assert RELATIVE_ERROR == CONTROLLER_RELATIVE_ERROR


def test_both_ends_read_a_window_alike() -> None:
    recorder = TelemetryRecorder(SloConfig())
    spent = {ServiceClass.STANDARD: (9, 0.5), ServiceClass.FULL: (3, 0.0)}
    recorder.record_step(StepRecord(8, 4, Levels(1, 2), 0.2, 0.1, routed_pairs=48, dimmed_pairs=8, spent=spent))
    recorder.record_first_token(ServiceClass.STANDARD, 0.3, 0.1)
    recorder.record_experts(ExpertLoad((1,), (3.0,), (0.5,), 1, (7,), (0.25,)))
    sent = recorder.drain(EngineStats(num_running=4, kv_used_frac=0.25), 0.25, predicted_step_time_s=(0.3,) * 5)
    message = window_to_proto(sent)
    message.replica_id, message.model_id, message.incarnation = "a", "model", 1
    read = read_window(message, Hello("a", "model", 1, 5, True, level_loss=(0.0, 0.1, 0.1, 0.1, 0.1)))
    assert read.phases[ControllerPhase.DECODE].shapes[4].num_steps == 1
    assert (read.classes["standard"].num_tokens, read.classes["standard"].loss_nats) == (9, 0.5)
    assert read.classes["standard"].ttft_s.quantile(0.5) == pytest.approx(0.3, rel=0.01)
    assert read.measured_per_predicted.quantile(0.5) == pytest.approx(2.0, rel=0.01)
    assert read.experts is not None
    assert (read.experts.layer, read.experts.active_experts, read.experts.hot_expert) == ((1,), (3.0,), (7,))
    assert read.predicted_step_time_s == (0.3,) * 5


async def test_settings_reach_every_replica(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    a, b = await cluster.start_replica("a"), await cluster.start_replica("b")
    await until_async(lambda: a.levels == b.levels == (1, 1))
    await service.set_policy("static", level=3)
    await until_async(lambda: a.levels == b.levels == (3, 3))
    await service.set_policy("off")
    await until_async(lambda: a.levels == b.levels == (0, 0))
    assert a.setting.reason == "brownout_off"
    await service.set_policy("predictive")
    await until_async(lambda: a.levels == b.levels == (0, 4))
    versions = [setting.version for setting in a.received]
    assert versions == sorted(versions) and len(set(versions)) == 4


async def test_status_and_decisions_tell_what_happens(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.agent.connected)
    await service.set_policy("static", level=2)
    await until_async(lambda: service.status()["models"]["model"]["replicas"]["a"]["level_decode"] == 2)
    await until_async(lambda: service.status()["models"]["model"]["observation"]["num_finished"] > 0)
    await until_async(lambda: service.status()["redis_ok"])
    await until_async(lambda: not service.status()["models"]["model"]["replicas"]["a"]["stale"])
    status = json.loads(json.dumps(service.status()))
    model, replica = status["models"]["model"], status["models"]["model"]["replicas"]["a"]
    assert (model["law"], model["policy"]["level"], model["epoch"], status["epoch"]) == ("static", 2, 1, 1)
    assert model["setting"]["decision"]["decode"]["floor"] == 2
    assert (replica["num_running"], replica["num_waiting"]) == (4, 2)
    assert 0 <= replica["lease_left_s"] <= CONFIG.lease_s and replica["last_window_age_s"] >= 0
    rows = service.decisions(1000)
    newest, *_, oldest = [row for row in rows if row["kind"] == "setting"]
    assert [row["reason"] for row in rows if row["kind"] == "policy"] == ["static"]
    assert (newest["version"], newest["reason"]) == (model["version"], "pinned")
    assert oldest["version"] == 1


async def test_a_policy_that_cannot_work_is_refused(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    for law, level in (("pid", None), ("static", 5), ("static", -1), ("predictive", 2)):
        with pytest.raises(LawError, match="allowed"):
            await service.set_policy(law, level)
    assert service.status()["models"]["model"]["version"] == 1


async def test_leases_are_renewed(cluster: Cluster) -> None:
    await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: len(a.received) >= 4)
    assert {(s.epoch, s.version, s.lease_s) for s in a.received} == {(1, 1, 1.0)}


async def test_the_law_answers_what_replicas_measure(cluster: Cluster) -> None:
    law_params = {"check_interval_s": 0.2, "window_s": 0.5}
    await cluster.start_controller(replace(CONFIG, law="aimd", law_params=law_params))
    a = await cluster.start_replica("a")
    a.step_time_s = 0.5  # five times the TPOT objective
    await until_async(lambda: a.levels == (4, 4))
    assert "slo_violated" in {setting.reason for setting in a.received}
    a.step_time_s = 0.001
    await until_async(lambda: a.levels == (0, 0))


async def test_an_unmeasured_ladder_is_not_climbed(cluster: Cluster) -> None:
    await cluster.start_controller()
    a = await cluster.start_replica("a", replace(MODEL, ladder_measured=False))
    await until_async(lambda: a.levels == (0, 0))
    assert a.setting.reason == "unmeasured_ladder"


async def test_models_are_controlled_apart(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    a, b = await cluster.start_replica("a"), await cluster.start_replica("b", replace(MODEL, name="other"))
    await until_async(lambda: a.levels == b.levels == (1, 1))
    await service.set_policy("static", level=4, model_id="other")
    await until_async(lambda: b.levels == (4, 4))
    assert a.levels == (1, 1)


async def test_controller_killed_and_restarted(cluster: Cluster) -> None:
    process = await cluster.start_controller_process("static", 3)
    a, b = await cluster.start_replica("a"), await cluster.start_replica("b")
    await until_async(lambda: a.levels == b.levels == (3, 3))
    before = a.setting
    process.kill()  # whether the state has been saved or not: replicas alone would do as well
    await process.wait()
    await until_async(lambda: not a.agent.connected and not b.agent.connected)
    assert a.levels == (3, 3), "the last setting stays"
    await cluster.start_controller_process("static", 2)
    await until_async(lambda: a.levels == b.levels == (2, 2))
    assert a.setting.epoch == before.epoch + 1
    assert a.setting.version == before.version + 1
    assert min(a.agent.num_connections, b.agent.num_connections) >= 2


async def test_an_operators_policy_outlives_the_controller(cluster: Cluster) -> None:
    first = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    await first.set_policy("off")
    await until_async(lambda: a.levels == (0, 0))
    before = a.setting
    await first.stop()
    second = await cluster.start_controller()
    await until_async(lambda: a.setting.epoch > before.epoch)
    assert a.levels == (0, 0)
    assert a.setting.version == before.version + 1
    rows = second.decisions()
    assert [row["epoch"] for row in rows if row["kind"] == "setting"] == [2, 1, 1]
    assert [row["epoch"] for row in rows if row["kind"] == "epoch"] == [2, 1]


async def test_a_decision_that_was_saved_twice_is_read_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # as if no save had been answered
        patch.setattr(DecisionLedger, "mark_saved", lambda *_: None)
        first = await cluster.start_controller()
        a = await cluster.start_replica("a")
        await until_async(lambda: a.levels == (1, 1))
        await first.stop()
    second = await cluster.start_controller()
    await until_async(lambda: a.setting.epoch == 2)
    assert [row["epoch"] for row in second.decisions() if row["kind"] == "epoch"] == [2, 1]
    assert [row["version"] for row in second.decisions() if row["kind"] == "setting"] == [2, 1]


async def test_a_controller_that_hangs_is_left(cluster: Cluster) -> None:
    process = await cluster.start_controller_process("static", 3)
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (3, 3))
    process.send_signal(signal.SIGSTOP)
    await until_async(lambda: not a.agent.connected)
    await cluster.start_controller()
    await until_async(lambda: a.levels == (1, 1))
    assert a.setting.epoch == 2


async def test_redis_killed_and_restarted(cluster: Cluster) -> None:
    service = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1) and service.status()["redis_ok"])
    assert cluster.redis.pid is not None
    os.kill(cluster.redis.pid, signal.SIGKILL)
    await until_async(lambda: not service.status()["redis_ok"])
    num_received = len(a.received)
    await service.set_policy("static", level=2)
    await until_async(lambda: a.levels == (2, 2) and len(a.received) > num_received + 2)
    before = a.setting
    cluster.redis.start()  # empty: it keeps nothing on disk
    await until_async(lambda: service.status()["redis_ok"])
    await service.stop()
    await cluster.start_controller()
    await until_async(lambda: a.setting.epoch > before.epoch)
    assert a.levels == (2, 2), "the policy that was set while Redis was away"
    assert a.setting.version == before.version + 1


async def test_redis_away_at_the_start(cluster: Cluster) -> None:
    cluster.redis.stop()
    service = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    assert not service.status()["redis_ok"]
    cluster.redis.start()
    await until_async(lambda: service.status()["redis_ok"] and a.setting.epoch == 1)
    assert a.levels == (1, 1)


async def test_a_controller_that_lost_its_memory_continues_above_the_replicas(cluster: Cluster) -> None:
    first = await cluster.start_controller()
    a = await cluster.start_replica("a")
    await until_async(lambda: a.levels == (1, 1))
    for level in (2, 3):
        await first.set_policy("static", level=level)
    await until_async(lambda: a.levels == (3, 3))
    before = a.setting
    await first.stop()
    cluster.redis.stop()
    await cluster.start_controller()
    await until_async(lambda: a.levels == (1, 1))
    assert a.setting.newer_than(before) and a.setting.version > before.version


async def test_a_taken_port_is_one_sentence(cluster: Cluster) -> None:
    await cluster.start_controller()
    port = int(cluster.address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
        await ControllerService(replace(CONFIG, port=port), cluster.redis.url).start()
    assert "\n" not in str(caught.value)
