"""The controller's shell: a gRPC server that replicas stream to, a tick loop that steps the laws, and a saver.

The tick loop never waits for Redis or for a replica: settings go to each stream's mailbox, state to the saver's next
save. Without Redis everything goes on in memory and is written when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import grpc
from redis.exceptions import RedisError

from controller.config import ControllerConfig
from controller.laws.base import LawError, create_law
from controller.ledger import DecisionLedger
from controller.model_control import ModelControl, Policy
from controller.reports import Hello, StepWindow
from controller.settings import ALL_MODELS, SettingsStore, SupersededError
from controller.status import describe_model, describe_policy
from controller.streams import SERVER_OPTIONS, ReplicaStream, StreamServicer
from protos import control_pb2_grpc

log = logging.getLogger(__name__)

RESTORE_TIMEOUT_S = 2.0  # how long the start waits for Redis; later it restores as soon as Redis answers
SAVE_INTERVAL_S = 1.0  # also without a change, so that a Redis that lost its data gets it back
STOP_GRACE_S = 0.2


class ControllerService:
    """One controller for all models. Use from one event loop: ``await start()`` ... ``await stop()``."""

    def __init__(self, config: ControllerConfig, redis_url: str) -> None:
        self._config = config
        self._store = SettingsStore(redis_url, config.key_prefix)
        self._ledger = DecisionLedger()
        self._policies: dict[str, Policy] = {}  # model_id or ALL_MODELS |-> what an operator set
        self._models: dict[str, ModelControl] = {}
        self._streams: dict[tuple[str, str], ReplicaStream] = {}  # (model_id, replica_id) |-> newest stream
        self._epoch = 0
        self._restored = False
        self._redis_ok = False
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""

    async def start(self) -> str:
        """Restore, listen, tick. Returns the ``host:port`` that replicas connect to; OSError if it cannot be bound."""
        with suppress(TimeoutError):
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                await self._save_once()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(StreamServicer(self), self._server)
        place = f"{self._config.host}:{self._config.port}"
        try:
            port = self._server.add_insecure_port(place)
        except RuntimeError as error:
            await self._server.stop(None)
            await self._store.close()
            raise OSError(f"the controller cannot listen on {place}: the port is taken or not ours to bind") from error
        await self._server.start()
        self.address = f"{self._config.host}:{port}"
        self._tasks = [asyncio.create_task(self._tick_loop()), asyncio.create_task(self._save_loop())]
        log.info("controller listens on %s, epoch %d, law %s", self.address, self._epoch, self._policy_of("").law)
        return self.address

    async def stop(self) -> None:
        """Close all streams and save once more; replicas keep their setting until its lease ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            await self._save_once()
        await self._store.close()

    async def set_policy(self, law: str, level: int | None = None, model_id: str | None = None) -> None:
        """Put ``law`` in force, for one model or for all; "off" pins level 0. LawError if it cannot be done."""
        policy = self._checked_policy(law, level, model_id)
        if model_id is None:
            self._policies = {ALL_MODELS: policy}
        else:
            self._policies[model_id] = policy
        now_s = time.monotonic()
        for control in self._models.values():
            if model_id in (None, control.model_id):
                control.set_policy(policy)
                self._tick(control, now_s)
        self._changed.set()

    def status(self) -> dict[str, Any]:
        """Everything an operator asks first, JSON-able."""
        now_s = time.monotonic()
        return {
            "address": self.address,
            "epoch": self._epoch,
            "redis_ok": self._redis_ok,
            "policy": describe_policy(self._policy_of("")),
            "models": {
                control.model_id: describe_model(control, self._replica_streams(control.model_id), now_s)
                for control in self._models.values()
            },
        }

    def decisions(self, limit: int = 100, model_id: str | None = None) -> list[dict[str, Any]]:
        """The newest decisions first, those of earlier lives included."""
        return self._ledger.recent(limit, model_id)

    # --- called by the streams -----------------------------------------------------------------------------------

    def join(self, stream: ReplicaStream, hello: Hello) -> None:
        """A replica said hello: it gets the current setting at once, above anything that it has already applied."""
        control = self._models.get(hello.model_id)
        if control is None:
            policy = self._policy_of(hello.model_id)
            control = self._models[hello.model_id] = ModelControl(hello.model_id, self._config, policy, self._epoch)
        if (hello.applied_epoch, hello.applied_version) > control.place:
            self._begin_epoch(hello.applied_epoch + 1)
        now_s = time.monotonic()
        self._streams[hello.model_id, hello.replica_id] = stream
        control.join(hello, now_s)
        self._tick(control, now_s)
        if control.setting is not None:
            stream.send(control.setting, now_s)

    def leave(self, stream: ReplicaStream, hello: Hello) -> None:
        """A stream ended; unless the replica has opened a newer one, it is gone."""
        key = (hello.model_id, hello.replica_id)
        if self._streams.get(key) is stream:
            del self._streams[key]
            self._models[hello.model_id].window.leave(hello.replica_id)

    def offer(self, window: StepWindow) -> None:
        self._models[window.model_id].window.offer(window, time.monotonic())

    # --- decisions -----------------------------------------------------------------------------------------------

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(self._config.tick_s)
            now_s = time.monotonic()
            for control in list(self._models.values()):
                try:
                    self._tick(control, now_s)
                    self._renew_leases(control, now_s)
                except Exception:
                    log.exception("tick of model %r failed; its replicas keep their setting", control.model_id)

    def _tick(self, control: ModelControl, now_s: float) -> None:
        setting = control.tick(now_s)
        if setting is None:
            return
        self._ledger.append(setting, control.observation, time.time())
        for stream in self._replica_streams(control.model_id).values():
            stream.send(setting, now_s)
        self._changed.set()

    def _renew_leases(self, control: ModelControl, now_s: float) -> None:
        if control.setting is None:
            return
        # Half a tick early rather than half a tick late.
        due_s = now_s - self._config.lease_s / 3 + self._config.tick_s / 2
        for stream in self._replica_streams(control.model_id).values():
            if stream.sent_at_s <= due_s:
                stream.send(control.setting, now_s)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = max(self._epoch, epoch)
        for control in self._models.values():
            control.begin_epoch(self._epoch)
        self._changed.set()

    def _replica_streams(self, model_id: str) -> dict[str, ReplicaStream]:
        return {replica_id: stream for (model, replica_id), stream in self._streams.items() if model == model_id}

    def _policy_of(self, model_id: str) -> Policy:
        configured = Policy(self._config.law, self._config.params)
        return self._policies.get(model_id) or self._policies.get(ALL_MODELS) or configured

    def _checked_policy(self, law: str, level: int | None, model_id: str | None) -> Policy:
        if law == "off":
            law, level = "static", 0
        if level is not None and law != "static":
            raise LawError(f"level is {level!r} with law {law!r}; allowed: a level only with law 'static'")
        params = (
            {"level": level or 0} if law == "static" else self._config.law_params if law == self._config.law else {}
        )
        create_law(law, self._config.slo, params)
        for control in self._models.values():
            num_levels = control.observation.num_levels
            if model_id in (None, control.model_id) and control.window.replicas and (level or 0) >= num_levels:
                raise LawError(f"level is {level}; allowed: 0 to {num_levels - 1}, the ladder of {control.model_id!r}")
        return Policy(law, params)

    # --- what outlives us ----------------------------------------------------------------------------------------

    async def _save_loop(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SAVE_INTERVAL_S):
                    await self._changed.wait()
            self._changed.clear()
            await self._save_once()
            await asyncio.sleep(self._config.tick_s)

    async def _save_once(self) -> None:
        """Restore if that is still due, then save. Redis being away is reported once and costs nothing else."""
        try:
            if not self._restored:
                await self._restore()
            settings = {c.model_id: saved for c in self._models.values() if (saved := c.to_save) is not None}
            await self._store.save(self._epoch, settings, self._policies, self._ledger)
        except (RedisError, OSError, SupersededError) as error:
            if self._redis_ok or not self.address:
                log.warning("controller state is not being saved: %s", error)
            self._redis_ok = False
        else:
            self._redis_ok = True

    async def _restore(self) -> None:
        epoch = await self._store.claim_epoch(above=self._epoch)
        saved = await self._store.load(self._ledger)
        self._restored = True
        for model_id, policy in saved.policies.items():
            try:
                create_law(policy.law, self._config.slo, policy.params)
            except LawError as error:
                log.warning("dropped the saved policy of %r: %s", model_id, error)
            else:
                self._policies.setdefault(model_id, policy)
        for model_id, setting in saved.settings.items():
            control = self._models.get(model_id)
            if control is None:
                policy = self._policy_of(model_id)
                control = self._models[model_id] = ModelControl(model_id, self._config, policy, epoch)
            elif control.policy != self._policy_of(model_id):
                control.set_policy(self._policy_of(model_id))
            control.restore(setting)
        self._begin_epoch(epoch)
