"""The simulated cluster: arrivals, routing, replicas, telemetry, controller, on one virtual clock.

Routing is cluster.router.policy over loads published every PUBLISH_PERIOD_S; telemetry and settings go through the
live protobuf messages and their checks; the controller's ModelControl decides as it does live.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulator.events import EventLoop
from benchmarks.simulator.plant import Plant
from benchmarks.simulator.replica import ReplicaLog, SimulatedReplica, profile_of
from benchmarks.simulator.scenario import ScenarioFile
from benchmarks.simulator.traffic import Request, Traffic
from cluster.router.arrivals import ArrivalRate
from cluster.router.policy import ARRIVALS_S, Demand, Picked, ReplicaLoad, rank
from controller.config import ControllerConfig
from controller.model_control import ModelControl, Policy
from controller.reports import Hello
from controller.types import Setting, Slo
from controller.wire import read_window, write_setting
from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, SloConfig
from engine.step_time import StepTimeModel
from engine.types import BrownoutSetting
from engine.wire import setting_from_proto, window_to_proto

MODEL_ID = "simulated"
REPORT_PERIOD_S = 0.25  # engine.agent.TelemetryAgent's period
PUBLISH_PERIOD_S = 0.1  # cluster.router.loads.PUBLISH_PERIOD_S
SETTLE_S = 5.0  # simulated beyond the last answer, so that the way back to level 0 is seen


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a run left behind."""

    logs: tuple[ReplicaLog, ...]
    settings: tuple[tuple[float, Setting], ...]
    end_s: float


class SimulatedCluster:
    """One run: build it, ``run`` it, read the outcome.

    ``profile``: what the governors believe at first; default: what profiling the plant would tell them.
    """

    def __init__(self, scenario: ScenarioFile, policy: Policy, seed: int, profile: StepTimeModel | None = None) -> None:
        self._scenario = scenario
        self._events = EventLoop()
        self._draw = random.Random(seed).random
        config = engine_config(scenario)
        loss = tuple(level.loss for level in scenario.plant.levels)
        self._profile = profile or profile_of(Plant(scenario.plant), config, scenario.profile_error)
        speeds = scenario.fleet.speeds
        self._replicas = [
            SimulatedReplica(
                f"r{i}",
                config,
                Plant(scenario.plant, speeds[i] if i < len(speeds) else 1.0),
                self._profile,
                loss,
                scenario.engine.num_blocks,
                self._events,
            )
            for i in range(scenario.fleet.num_simulated)
        ]
        self._by_id = {replica.replica_id: replica for replica in self._replicas}
        slo = Slo(scenario.slo.ttft_s, scenario.slo.tpot_s)
        controller_config = ControllerConfig(slo=slo, tick_s=scenario.tick_s)
        self._control = ModelControl(MODEL_ID, controller_config, policy, epoch=1)
        self._hellos = {
            replica_id: Hello(replica_id, MODEL_ID, 1, len(loss), ladder_measured=True, level_loss=loss)
            for replica_id in self._by_id
        }
        self._loads: dict[str, ReplicaLoad] = {}
        self._picked: dict[str, Picked] = {}
        self._num_received: Counter[str] = Counter()
        self._arrivals = {replica_id: ArrivalRate(ARRIVALS_S) for replica_id in self._by_id}
        self._settings: list[tuple[float, Setting]] = []
        self._num_routed = 0

    def run(
        self, traffic: Traffic, end_s: float | None = None, on_progress: Callable[[int], None] | None = None
    ) -> Outcome:
        """Until every request is answered and SETTLE_S have passed, or until ``end_s``."""
        events, delay_s = self._events, self._scenario.network_delay_s
        for hello in self._hellos.values():
            self._control.join(hello, 0.0)
        events.every(self._scenario.tick_s, self._tick)
        for index, replica in enumerate(self._replicas):
            offset_s = REPORT_PERIOD_S * (index + 0.5) / len(self._replicas)
            events.every(REPORT_PERIOD_S, lambda replica=replica: self._report(replica), offset_s)
            events.every(PUBLISH_PERIOD_S, lambda replica=replica: self._publish(replica), offset_s % PUBLISH_PERIOD_S)
        arrivals = iter(traffic.requests)

        def arrive(request: Request) -> None:
            self._route(request)
            if on_progress is not None:
                on_progress(1)
            following = next(arrivals, None)
            if following is not None:
                events.at(following.at_s + delay_s, lambda: arrive(following))

        first = next(arrivals)
        events.at(first.at_s + delay_s, lambda: arrive(first))
        limit_s = float("inf") if end_s is None else end_s
        num_requests = len(traffic.requests)
        events.run(lambda: self._num_answered == num_requests or events.now_s >= limit_s)
        settled_s = events.now_s + SETTLE_S
        events.run(lambda: events.now_s >= min(settled_s, limit_s))
        return Outcome(tuple(replica.log for replica in self._replicas), tuple(self._settings), events.now_s)

    @property
    def _num_answered(self) -> int:
        return sum(len(replica.log.records) for replica in self._replicas)

    def _route(self, request: Request) -> None:
        ids = list(self._by_id)
        if self._scenario.fleet.routing == "round_robin" or len(ids) == 1:
            order = [ids[self._num_routed % len(ids)]]
        elif self._scenario.fleet.routing == "shortest_queue":
            order = self._by_queue(ids)
        elif self._scenario.fleet.routing == "split":
            share = self._scenario.fleet.first_share
            is_first = int((self._num_routed + 1) * share) > int(self._num_routed * share)
            order = ids[:1] if is_first else self._by_queue(ids[1:])
        else:
            demand = Demand(request.num_prompt, request.full)
            order = rank(ids, self._loads, self._picked, self._draw, demand) or ids
        self._num_routed += 1
        before = self._picked.get(order[0], Picked())
        self._picked[order[0]] = Picked(before.num_requests + 1, before.prompt_tokens + request.num_prompt)
        self._num_received[order[0]] += 1
        self._by_id[order[0]].submit(f"q{self._num_routed}", request)

    def _by_queue(self, replica_ids: list[str]) -> list[str]:
        return sorted(replica_ids, key=lambda replica_id: (self._num_held(replica_id), self._draw()))

    def _num_held(self, replica_id: str) -> int:
        load = self._loads.get(replica_id)
        return self._picked.get(replica_id, Picked()).num_requests + (load.held if load else 0)

    def _publish(self, replica: SimulatedReplica) -> None:
        now_s, replica_id = self._events.now_s, replica.replica_id
        before = self._loads.get(replica_id)
        self._loads[replica_id] = ReplicaLoad.of(
            replica.stats(),
            replica.brownout,
            now_s,
            sequence=before.sequence + 1 if before else 1,
            max_num_batched_tokens=self._scenario.engine.max_num_batched_tokens,
            arrivals_per_s=self._arrivals[replica_id].update(self._num_received[replica_id], now_s),
        )
        self._picked.pop(replica_id, None)

    def _report(self, replica: SimulatedReplica) -> None:
        message = window_to_proto(replica.take_window())
        message.replica_id, message.model_id, message.incarnation = replica.replica_id, MODEL_ID, 1
        window = read_window(message, self._hellos[replica.replica_id])
        self._control.window.offer(window, self._events.now_s)

    def _tick(self) -> None:
        now_s = self._events.now_s
        changed = self._control.tick(now_s)
        if changed is not None:
            self._settings.append((now_s, changed))
        if self._control.setting is None:
            return
        setting = _delivered(self._control.setting)
        self._events.at(now_s + self._scenario.network_delay_s, lambda: self._apply(setting))

    def _apply(self, setting: BrownoutSetting) -> None:
        for replica in self._replicas:
            replica.apply(setting)


def engine_config(scenario: ScenarioFile) -> EngineConfig:
    engine = scenario.engine
    return EngineConfig(
        ModelConfig("simulated"),
        cache=CacheConfig(block_size=engine.block_size, num_blocks=engine.num_blocks, prefix_caching=False),
        scheduler=SchedulerConfig(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_waiting=engine.max_num_waiting,
            **engine.options,
        ),
        slo=SloConfig(scenario.slo.ttft_s, scenario.slo.tpot_s),
    )


def _delivered(setting: Setting) -> BrownoutSetting:
    """As a replica reads it from the wire."""
    return setting_from_proto(write_setting(setting).setting)
