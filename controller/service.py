"""The controller's shell: a gRPC server that replicas stream to, a tick loop that steps the laws, and a saver.

The tick loop never waits for Redis or for a replica: settings go to each stream's mailbox, state to the saver's next
save. Without Redis everything goes on in memory and is written when it is back.

Of two controllers on one Redis the newer one controls: the older finds its epoch outdated when it next saves, or when a
replica that has followed the newer one comes back to it, and stands down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

import grpc
from redis.exceptions import RedisError

from controller.arbiter import Rung
from controller.config import ControllerConfig
from controller.model_control import ModelControl
from controller.reports import Hello, StepWindow
from controller.security import log_security, read_security
from controller.settings import ALL_MODELS, SettingsStore, SupersededError
from controller.state import ControllerState
from controller.status import describe_model, describe_policy
from controller.streams import SERVER_OPTIONS, JoinRefusedError, ReplicaStream, StreamServicer
from protos import control_pb2_grpc

log = logging.getLogger(__name__)

RESTORE_TIMEOUT_S = 2.0  # how long the start waits for Redis; later it restores as soon as Redis answers
SAVE_INTERVAL_S = 1.0  # also without a change, so that a Redis that lost its data gets it back
STOP_GRACE_S = 0.2
TELL_MEASURES_S = 1.0


class ControllerService:
    """One controller for all models. Use from one event loop: ``await start()`` ... ``await stop()``."""

    def __init__(self, config: ControllerConfig, redis_url: str) -> None:
        self._config = config
        self._store = SettingsStore(redis_url, config.key_prefix)
        self._state = ControllerState(config)
        self._streams: dict[tuple[str, str], ReplicaStream] = {}  # (model_id, replica_id) |-> newest stream
        self._told: dict[str, tuple[tuple[Rung, ...], float]] = {}  # model_id |-> measures last recorded, and when
        self._restored = False
        self._redis_ok = False
        self._changed = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._closing: asyncio.Task[None] | None = None
        self.address = ""
        self.superseded = False  # a newer controller uses our Redis keys: this one controls nothing any more

    async def start(self) -> str:
        """Restore, listen, tick. Returns the ``host:port`` that replicas connect to.

        OSError if it cannot be bound, a file of the configured security cannot be read, or a newer one begins.
        """
        token, credentials = read_security(self._config.security)
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        control_pb2_grpc.add_ControlServicer_to_server(StreamServicer(self, token), self._server)
        place = f"{self._config.host}:{self._config.port}"
        try:
            if credentials is not None:
                port = self._server.add_secure_port(place, credentials)
            else:
                port = self._server.add_insecure_port(place)
        except RuntimeError as error:
            await self._server.stop(None)
            await self._store.close()
            raise OSError(f"the controller cannot listen on {place}: the port is taken or not ours to bind") from error
        # Only now: who cannot serve must not supersede one that does.
        with suppress(TimeoutError):
            async with asyncio.timeout(RESTORE_TIMEOUT_S):
                await self._save_once()
        if self.superseded:
            await self._server.stop(None)
            await self._store.close()
            raise OSError("a newer controller has begun in the meantime")
        await self._server.start()
        self.address = f"{self._config.host}:{port}"
        self._state.ledger.append_epoch(self._state.epoch, self.address, time.time())
        self._tasks = [asyncio.create_task(self._tick_loop()), asyncio.create_task(self._save_loop())]
        law = self._state.policy_of("").law
        log.info("controller listens on %s, epoch %d, law %s", self.address, self._state.epoch, law)
        log_security(self._config.host, bool(token), credentials is not None)
        return self.address

    async def stop(self) -> None:
        """Close all streams and save once more; replicas keep their setting until its lease ends."""
        self._stopping = True  # redis-py may swallow a cancellation that meets a lost connection
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._closing is not None:
            await self._closing
        elif self._server is not None:
            await self._server.stop(STOP_GRACE_S)
            await self._save_once()
        await self._store.close()

    async def set_policy(self, law: str, level: int | None = None, model_id: str | None = None) -> None:
        """Follow an operator's order, for one model or for all: a law's name, "static" with a level, "off", "freeze"
        (the level that the replicas have now) or "auto" (the configured law). LawError if it cannot be done."""
        concerned = self._state.set_policy(law, level, model_id)
        policy = describe_policy(self._state.policy_of(model_id or ""))
        self._state.ledger.append_policy(model_id or ALL_MODELS, law, policy, time.time())
        now_s = time.monotonic()
        for control in concerned:
            self._tick(control, now_s)
        self._changed.set()

    def status(self) -> dict[str, Any]:
        """Everything an operator asks first, JSON-able."""
        now_s = time.monotonic()
        return {
            "address": self.address,
            "epoch": self._state.epoch,
            "superseded": self.superseded,
            "redis_ok": self._redis_ok,
            "policy": describe_policy(self._state.policy_of("")),
            "models": {
                control.model_id: describe_model(control, self._replica_streams(control.model_id), self._config, now_s)
                for control in self._state.models.values()
            },
        }

    def decisions(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest decisions first, those of earlier lives included."""
        return self._state.ledger.recent(limit)

    def decisions_between(self, since_s: float, until_s: float) -> list[dict[str, Any]]:
        """Those of [since_s, until_s), Unix time by the controller's clock, newest first."""
        return self._state.ledger.between(since_s, until_s)

    def decisions_of(self, model_id: str, first: int, last: int) -> list[dict[str, Any]]:
        """The settings of a model with versions ``first`` to ``last``, newest first."""
        return self._state.ledger.of_versions(model_id, first, last)

    # --- called by the streams -----------------------------------------------------------------------------------

    async def join(self, stream: ReplicaStream, hello: Hello) -> None:
        """A replica said hello: it gets the current setting at once, above anything that it has already applied."""
        control = self._state.control_of(hello.model_id)
        if (hello.applied_epoch, hello.applied_version) > control.place:
            await self._rise_above(hello.applied_epoch)
        if self.superseded:
            raise JoinRefusedError("a newer controller is in charge")
        now_s = time.monotonic()
        self._streams[hello.model_id, hello.replica_id] = stream
        control.join(hello, now_s)
        self._tick(control, now_s)
        if control.setting is not None:
            stream.send(control.setting, now_s)

    def leave(self, stream: ReplicaStream, hello: Hello) -> None:
        """A stream ended; unless the replica has opened a newer one, it is gone."""
        if self._is_newest(stream, hello.model_id, hello.replica_id):
            del self._streams[hello.model_id, hello.replica_id]
            self._state.models[hello.model_id].window.leave(hello.replica_id)

    def offer(self, stream: ReplicaStream, window: StepWindow) -> None:
        """What an older stream of the replica still delivers comes too late to say anything, and is no fault."""
        if self._is_newest(stream, window.model_id, window.replica_id):
            self._state.models[window.model_id].window.offer(window, time.monotonic())

    def refuse(self, stream: ReplicaStream, hello: Hello) -> None:
        if self._is_newest(stream, hello.model_id, hello.replica_id):
            self._state.models[hello.model_id].window.refuse(hello.replica_id)

    def _is_newest(self, stream: ReplicaStream, model_id: str, replica_id: str) -> bool:
        return self._streams.get((model_id, replica_id)) is stream

    async def _rise_above(self, epoch: int) -> None:
        """A replica follows epoch ``epoch``, which is not older than ours: who is in charge, Redis knows."""
        try:
            newest = await self._store.newest_epoch()
            if newest > self._state.epoch:
                self._stand_down(f"epoch {newest} has been claimed, ours is {self._state.epoch}")
            else:  # Redis has forgotten the replica's epoch, so nobody else claims it
                self._begin_epoch(await self._store.claim_epoch(above=epoch))
        except (RedisError, OSError) as error:
            if self._restored:
                raise JoinRefusedError(
                    f"the replica follows epoch {epoch}, ours is {self._state.epoch}, and Redis cannot be asked"
                ) from error
            self._begin_epoch(epoch + 1)  # we have no place in the order of lives yet

    # --- decisions -----------------------------------------------------------------------------------------------

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(self._config.tick_s)
            now_s = time.monotonic()
            for control in list(self._state.models.values()):
                try:
                    self._tick(control, now_s)
                    self._plan(control, now_s)
                    self._renew_leases(control, now_s)
                except Exception:
                    log.exception("tick of model %r failed; its replicas keep their setting", control.model_id)

    def _tick(self, control: ModelControl, now_s: float) -> None:
        setting = control.tick(now_s)
        if setting is None:
            return
        self._state.ledger.append(setting, control.observation, time.time())
        for stream in self._replica_streams(control.model_id).values():
            stream.send(setting, now_s)
        self._changed.set()

    def _plan(self, control: ModelControl, now_s: float) -> None:
        self._tell_measures(control, now_s)
        if control.tick_plan(now_s) and control.plan is not None and control.fleet is not None:
            self._state.ledger.append_plan(control.model_id, control.plan, control.fleet, time.time())
            log.info("%s should have %d replicas: %s", control.model_id, control.plan.desired, control.plan.reason)
            self._changed.set()

    def _tell_measures(self, control: ModelControl, now_s: float) -> None:
        """Record other rungs than before, once a second: a load at the edge of one would fill the ledger."""
        rungs, told_at_s = self._told.get(control.model_id, (None, float("-inf")))
        if control.measures is None or control.measures.rungs == rungs or now_s - told_at_s < TELL_MEASURES_S:
            return
        self._told[control.model_id] = (control.measures.rungs, now_s)
        self._state.ledger.append_measures(control.model_id, control.measures, control.observation, time.time())
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
        self._state.begin_epoch(epoch)
        self._changed.set()

    def _replica_streams(self, model_id: str) -> dict[str, ReplicaStream]:
        return {replica_id: stream for (model, replica_id), stream in self._streams.items() if model == model_id}

    def _stand_down(self, why: str) -> None:
        """Leave all replicas to the newer controller: they ask where it is as soon as their streams end."""
        if self.superseded:
            return
        self.superseded = True
        log.error("this controller stands down, a newer one is in charge: %s", why)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._server is not None and self.address:  # it listens
            self._closing = asyncio.create_task(self._server.stop(STOP_GRACE_S))

    # --- what outlives us ----------------------------------------------------------------------------------------

    async def _save_loop(self) -> None:
        while not (self.superseded or self._stopping):
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
                epoch = await self._store.claim_epoch(above=self._state.epoch)
                saved = await self._store.load(self._state.ledger, time.monotonic())
                self._restored = True
                self._state.restore(saved, epoch)
            await self._store.save(self._state.to_save(time.monotonic()), self._state.ledger)
            self._redis_ok = True
        except SupersededError as error:
            self._stand_down(str(error))
        except Exception as error:  # whatever a lost connection makes the client raise: the next save tries again
            if self._redis_ok or not self.address:
                log.warning("controller state is not being saved: %s", error)
            self._redis_ok = False
