"""Replacing united experts while serving: checked as a whole, then put in place layer by layer between steps.

Every layer has at any time the old united experts, the new ones, or none (then it is not dimmed by that way), never a
mixture; originals are not touched, so level 0 stays exact throughout. One layer is in host memory at a time, and one
more while it is read ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.config import WAYS, ConfigError, EngineConfig
from engine.models.spec import ModelSpec
from engine.moe.dimming import Dimming, check_ladder, dimming_digest, path_beside
from engine.moe.experts import PackedExperts
from engine.moe.ladder import LADDER_FILE, Ladder, read_ladder
from engine.moe.united import ArtefactError, UnitedArtefact, UnitedLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """A swap that has been checked and can begin."""

    artefact: UnitedArtefact
    replaces: int | None  # way that gives up its rows
    ladder: Ladder  # in force once all layers are in place


def plan_swap(
    dimming: Dimming,
    config: EngineConfig,
    spec: ModelSpec,
    path: str,
    ladder_path: str = "",
    replaces: int | None = None,
) -> SwapPlan:
    """Read and check everything; changes nothing and may run in any thread.

    The ladder is the one named, else ladder.json beside the united experts, else the one in force; it must have as many
    levels. Raises ArtefactError or ConfigError.
    """
    table = dimming.table
    if table is None:
        raise ConfigError("this engine cannot dim, so it has no room for united experts; set brownout.united at start")
    model = Path(config.model.path)
    digest = dimming_digest(config.model)
    artefact = UnitedArtefact(path_beside(path, model))
    artefact.check_fits(spec, digest, WAYS)
    if replaces is not None and replaces not in dimming.united:
        raise ConfigError(f"--replaces is {replaces}; allowed: a loaded way, {sorted(dimming.united)}")
    if replaces == artefact.way:
        replaces = None
    table.check_room(artefact.way, replaces)
    united: dict[int, UnitedLayers] = {way: source for way, source in dimming.united.items() if way != replaces}
    united[artefact.way] = artefact
    beside = artefact.directory / LADDER_FILE
    given = path_beside(ladder_path, model) if ladder_path else beside
    candidate = read_ladder(given) if ladder_path or beside.exists() else dimming.ladder
    ladder = check_ladder(candidate, given, united, digest, config.brownout.allow_unmeasured)
    if len(ladder) != len(dimming.ladder):
        raise ConfigError(f"the ladder {given} has {len(ladder)} levels; allowed here: {len(dimming.ladder)}, as now")
    dimming.dimmer.check_settings(ladder.settings)
    artefact.check_weights()
    return SwapPlan(artefact, replaces, ladder)


class UnitedSwap:
    """A swap under way. `advance` belongs to the thread that runs the steps."""

    def __init__(self, plan: SwapPlan, dimming: Dimming, device: torch.device) -> None:
        assert dimming.table is not None
        self.plan = plan
        self._dimming, self._table = dimming, dimming.table
        self._reader = _ReadAhead(plan.artefact, device)
        self._layers = list(self._table.layers)
        self._begun = False
        self._on_end: list[Callable[[Exception | None], None]] = []

    def on_end(self, call: Callable[[Exception | None], None]) -> None:
        """Call it when the swap has ended, with what went wrong if something did."""
        self._on_end.append(call)

    def advance(self, wait: bool) -> bool:
        """Put the next layer in place if it has been read, or ``wait`` for it; True when the swap has ended."""
        if not self._begun:
            self._begin()
        elif not wait and not self._reader.ready:
            return False
        try:
            self._table.load_layer(self._reader, self._layers[0])
        except ArtefactError as error:  # the files changed after they were checked
            self._table.forget(self.plan.artefact.way)
            self._dimming.united.pop(self.plan.artefact.way, None)
            logger.error("the swap has ended, no %d-way experts are in use now: %s", self.plan.artefact.way, error)
            self._end(error)
            return True
        del self._layers[0]
        if self._layers:
            self._reader.read(self._layers[0])
            return False
        self._dimming.adopt(self.plan.artefact, self.plan.ladder)
        logger.info("united experts %s are in place", self.plan.artefact.directory)
        self._end(None)
        return True

    def _begin(self) -> None:
        self._begun = True
        self._reader.read(self._layers[0])
        way, replaces = self.plan.artefact.way, self.plan.replaces
        if replaces is not None:
            self._dimming.united.pop(replaces, None)
        self._table.make_room(way, replaces)
        self._dimming.protect(self.plan.artefact.protect)

    def _end(self, error: Exception | None) -> None:
        self._reader.close()
        for call in self._on_end:
            call(error)


@dataclass(slots=True)
class _ReadAhead:
    """An artefact whose next layer is read in a thread of its own, into pinned memory where a copy gains by it."""

    artefact: UnitedArtefact
    device: torch.device
    way: int = field(init=False)
    digest: str = field(init=False)
    protect: tuple[tuple[int, int], ...] = field(init=False)
    _executor: ThreadPoolExecutor = field(init=False)
    _next: Future[tuple[Tensor, Tensor]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.way, self.digest, self.protect = self.artefact.way, self.artefact.digest, self.artefact.protect
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="united-reader")

    @property
    def ready(self) -> bool:
        return self._next is None or self._next.done()

    def read(self, layer: int) -> None:
        self._next = self._executor.submit(self._read, layer) if self.artefact.groups(layer) else None

    def groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        return self.artefact.groups(layer)

    def weights(self, layer: int, experts: PackedExperts) -> tuple[Tensor, Tensor]:
        assert self._next is not None
        return self._next.result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        gate_up, down = self.artefact.read(layer)
        return (gate_up.pin_memory(), down.pin_memory()) if self.device.type == "cuda" else (gate_up, down)
