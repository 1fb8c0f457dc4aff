"""The engine in a thread of its own, for asyncio callers.

The engine thread owns the Engine; the event loop talks to it through a queue of commands and gets outputs back once
per step. Neither ever waits for the other: the loop never blocks on a step, the engine never on a slow client.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable

from engine.brownout import Brownout
from engine.config import EngineConfig
from engine.engine import Engine
from engine.level_log import LevelLog
from engine.outbox import Outbox
from engine.request_log import RequestLog
from engine.sampling.grammar import GrammarState
from engine.telemetry import StepWindow, Totals
from engine.text.tokenizer import Tokenizer
from engine.types import (
    BrownoutSetting,
    EngineBusyError,
    EngineDeadError,
    EngineStats,
    GenerationRequest,
    InvalidRequestError,
    ModelInfo,
    RequestOutput,
)

logger = logging.getLogger(__name__)

STALLED_S = 4.0  # an engine whose thread has come round neither to a step nor to idling for so long is wedged ...
STALLED_STEPS = 20  # ... unless its steps take long: then so many times the predicted step
LOOK_S = 1.0  # at most so much of it is counted between two looks at its health: in a longer pause nobody ran
IDLE_POLL_S = 0.5  # how often an idle engine thread refreshes its stats
STOP_TIMEOUT_S = 5.0  # for the step under way; a wedged thread is left behind, it ends with the process

Deliver = Callable[[RequestOutput | Exception], None]


class AsyncEngine:
    """Created by `start`; all methods belong to the event loop that started it."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, Deliver] = {}
        self._outbox = Outbox(config.stream_interval_s)
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._stats = EngineStats()
        self._last_step_s = self._seen_step_s = self._looked_s = time.monotonic()
        self._stalled_s = 0.0
        self._stopping = False
        self._failure: BaseException | None = None
        self._engine: Engine
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @classmethod
    async def start(cls, config: EngineConfig) -> AsyncEngine:
        """Load the model and start serving. Raises what Engine raises."""
        self = cls(config)
        self._thread.start()
        await self._started
        return self

    async def stop(self) -> None:
        """End the engine thread; requests still in it end with EngineDeadError."""
        self._stopping = True
        self._commands.put(lambda: None)
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        self._end_all()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request until its finish_reason. Closing the iterator early aborts the request.

        Raises InvalidRequestError, EngineBusyError or EngineDeadError.
        """
        stream: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self.submit(request, stream.put_nowait)
        finished = False
        try:
            while not finished:
                item = await stream.get()
                finished = isinstance(item, Exception) or item.finished
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not finished:
                self.drop(request.request_id)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Start a request. ``deliver`` is called on the event loop with each output, up to the last: one with a
        finish_reason, or an error as `generate` raises it.

        Raises InvalidRequestError for an id in use, EngineDeadError.
        """
        self.check_health()
        if request.request_id in self._streams:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use", "request_id")
        self._streams[request.request_id] = deliver
        if request.sampling.grammar is None:
            self._commands.put(lambda: self._add(request))
            return
        # In a thread of its own: the engine's makes no step meanwhile, and the event loop serves other streams.
        compiling = self._loop.run_in_executor(None, self._engine.grammars.compile, request.sampling.grammar)
        compiling.add_done_callback(lambda compiled: self._add_compiled(request, deliver, compiled))

    def drop(self, request_id: str) -> None:
        """End a request of which nobody wants to hear any more; nothing if it has ended."""
        if self._streams.pop(request_id, None) is not None:
            self._commands.put(lambda: self._abort(request_id))

    def abort(self, request_id: str) -> None:
        """End a request before the next step; its iterator gets a last output with finish_reason "abort"."""
        self._commands.put(lambda: self._abort(request_id))

    def apply_setting(self, setting: BrownoutSetting) -> bool:
        """Put a setting in force from the next step on; False if a newer one is in force."""
        return self._engine.apply_setting(setting)

    async def swap_united(self, path: str, ladder: str = "", replaces: int | None = None) -> None:
        """Replace united experts while serving; returns when all layers are in place.

        Raises ArtefactError or ConfigError, with everything as it was; RuntimeError while another swap is under way.
        """
        plan = await asyncio.to_thread(self._engine.plan_swap, path, ladder, replaces)
        ended: asyncio.Future[None] = self._loop.create_future()

        def end(error: Exception | None) -> None:
            if not ended.done():
                if error:
                    ended.set_exception(error)
                else:
                    ended.set_result(None)

        def begin() -> None:
            try:
                self._engine.swap_united(plan).on_end(lambda error: self._call_soon(end, error))
            except RuntimeError as error:
                self._call_soon(end, error)

        self.check_health()
        self._commands.put(begin)
        await ended

    def stats(self) -> EngineStats:
        """The load after the newest step."""
        return self._stats

    @property
    def brownout(self) -> Brownout:
        """The governor's model and limits, to be read only."""
        return self._engine.brownout

    def take_window(self) -> StepWindow:
        """Telemetry since the last call."""
        brownout = self._engine.brownout
        return self._engine.recorder.drain(
            self._stats,
            time.monotonic(),
            applied_epoch=brownout.newest.epoch,
            trim=brownout.governor.model.trim,
            predicted_step_time_s=brownout.governor.smoothed_s,
        )

    def totals(self) -> Totals:
        """Counters since start."""
        return self._engine.recorder.totals()

    @property
    def request_log(self) -> RequestLog:
        """What became of the newest requests."""
        return self._engine.request_log

    @property
    def level_log(self) -> LevelLog:
        """The newest level changes."""
        return self._engine.level_log

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine thread has died or makes no progress, whether or not it has requests:
        those of a wedged engine are taken from it, and it must not look well again because of that. To be called
        once a second or more often.
        """
        if self._failure is not None:
            raise EngineDeadError(f"the engine has stopped: {self._failure}") from self._failure
        if self._stopping:
            raise EngineDeadError("the engine is stopping")
        self._note_progress()
        if self._stalled_s > max(STALLED_S, STALLED_STEPS * self._stats.predicted_step_s):
            raise EngineDeadError(f"the engine has made no progress for {self._stalled_s:.0f} s")

    def _note_progress(self) -> None:
        """How long the engine thread has been seen not to come round. Where the whole process was suspended, the event
        loop may go on before the engine thread does: that engine is well.
        """
        now_s, last_step_s = time.monotonic(), self._last_step_s
        if last_step_s != self._seen_step_s:
            self._seen_step_s, self._stalled_s = last_step_s, 0.0
        else:
            self._stalled_s += min(now_s - self._looked_s, LOOK_S)
        self._looked_s = now_s

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    # Engine thread

    def _run(self) -> None:
        try:
            self._engine = Engine(self._config)
            gc.collect()
            gc.freeze()  # what was loaded stays: a full collection between two steps would walk through all of it
        except BaseException as error:
            self._failure = error
            self._loop.call_soon_threadsafe(self._started.set_exception, error)
            return
        self._stats, self._last_step_s = self._engine.stats(), time.monotonic()
        self._loop.call_soon_threadsafe(self._started.set_result, None)
        try:
            while not self._stopping:
                self._run_commands()
                outputs = self._outbox.collect(self._engine.step(), time.monotonic())
                self._stats = self._engine.stats()
                self._last_step_s = time.monotonic()
                self._send(outputs)
        except BaseException as error:
            logger.exception("the engine failed")
            self._failure = error
        self._call_soon(self._end_all)

    def _run_commands(self) -> None:
        """Run all waiting commands; without work, wait for one."""
        try:
            if not self._engine.has_work:
                self._commands.get(timeout=IDLE_POLL_S)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _add(self, request: GenerationRequest, grammar: GrammarState | None = None) -> None:
        try:
            self._engine.add(request, grammar)
        except (InvalidRequestError, EngineBusyError) as error:
            self._call_soon(self._deliver, request.request_id, error)

    def _abort(self, request_id: str) -> None:
        output = self._engine.abort(request_id)
        if output is not None:
            self._send(self._outbox.collect([output], time.monotonic()))

    def _send(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._call_soon(self._deliver_all, outputs)

    def _call_soon(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._stopping = True

    # Event loop

    def _add_compiled(
        self, request: GenerationRequest, deliver: Deliver, compiled: asyncio.Future[GrammarState]
    ) -> None:
        if self._streams.get(request.request_id) is not deliver or compiled.cancelled():  # dropped meanwhile
            return
        if error := compiled.exception():
            self._deliver(request.request_id, error if isinstance(error, Exception) else EngineDeadError(str(error)))
        else:
            grammar = compiled.result()
            self._commands.put(lambda: self._add(request, grammar))

    def _deliver_all(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._deliver(output.request_id, output)

    def _deliver(self, request_id: str, item: RequestOutput | Exception) -> None:
        deliver = self._streams.get(request_id)
        if deliver is not None:
            if isinstance(item, Exception) or item.finished:
                del self._streams[request_id]
            deliver(item)

    def _end_all(self) -> None:
        reason = f"the engine has stopped: {self._failure}" if self._failure else "the engine is stopping"
        for request_id in list(self._streams):
            self._deliver(request_id, EngineDeadError(reason))
