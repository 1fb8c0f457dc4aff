"""Builds united experts of a model: layer by layer, for any number of ways and methods in one pass over the text.

A build that was interrupted goes on at the layer where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import ConfigError, require
from engine.models.spec import ModelSpec
from engine.moe.united import MANIFEST_FILE, LayerGroups, UnitedManifest, layer_file, write_layer
from engine.pool.slots import ModelSlot
from engine.unite.baselines import average, frequency_average, mixture_distil
from engine.unite.calibration import sequences_digest
from engine.unite.capture import trace_layers
from engine.unite.distil import DistilOptions, distil
from engine.unite.groups import GROUPINGS, make_grouping
from engine.unite.instant import instant_build
from engine.unite.pairs import LayerTrace, routed_pairs
from engine.unite.protect import super_experts
from engine.unite.united_layer import UnitedLayer, mean_error, routed_errors

METHODS = ("routed", "instant", "mixture", "frequency", "average")  # the last three for comparison only
STATE_FILE = "build.json"


@dataclass(frozen=True, slots=True)
class UniteOptions:
    """How to build. ``groupings``: those tried in each layer; the one with the lowest held-out error is kept.

    ``max_error``: a group above this held-out routed error is stored, but marked "do not use".
    """

    groupings: tuple[str, ...] = GROUPINGS
    exempt_first: int = 2  # layers without united experts
    exempt_last: int = 2
    max_error: float = 0.6
    held_out_frac: float = 1 / 8  # of the sequences
    distil: DistilOptions = field(default_factory=DistilOptions)

    def __post_init__(self) -> None:
        for name in self.groupings:
            require(name in GROUPINGS, "unite.groupings", name, ", ".join(GROUPINGS))
        require(bool(self.groupings), "unite.groupings", list(self.groupings), "at least one")
        require(self.max_error > 0, "unite.max_error", self.max_error, "a positive number")
        require(0 < self.held_out_frac < 1, "unite.held_out_frac", self.held_out_frac, "in (0, 1)")


@dataclass(frozen=True, slots=True)
class Job:
    """One artefact to build."""

    way: int
    method: str
    directory: Path

    def __post_init__(self) -> None:
        require(self.method in METHODS, "unite.method", self.method, ", ".join(METHODS))
        require(self.way >= 2, "unite.way", self.way, "2 or more members for each united expert")


@dataclass(frozen=True, slots=True)
class Progress:
    """One layer of one job is done."""

    job: Job
    layer: int
    grouping: str
    error: float  # mean held-out routed error of its groups
    num_refused: int  # groups above the limit
    seconds: float
    num_done: int
    num_total: int


def unite(
    slot: ModelSlot,
    model_digest: str,
    sequences: Tensor,
    jobs: Sequence[Job],
    options: UniteOptions,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Build every job's artefact from calibration ``sequences`` [S, T].

    Raises ConfigError if a directory holds something else, or if no layer is left to build.
    """
    spec = slot.spec
    dimmable = range(options.exempt_first, spec.num_layers - options.exempt_last)
    layers = [layer for layer in spec.moe_layers if layer in dimmable]
    if not layers:
        raise ConfigError(
            f"unite.exempt_first is {options.exempt_first} and exempt_last {options.exempt_last}; allowed: values that "
            f"leave one of the model's {len(spec.moe_layers)} layers with routed experts"
        )
    digest = sequences_digest(sequences)
    builds = [_JobState.open(job, _key(job, model_digest, digest, options)) for job in jobs]
    builds = [build for build in builds if not build.finished]
    num_done, num_total = sum(len(build.layers) for build in builds), len(builds) * len(layers)
    if not builds:
        return
    for layer, trace in trace_layers(slot, sequences):
        waiting = [build for build in builds if layer in layers and layer not in build.layers]
        if not waiting:
            continue
        workbench = _Workbench(trace, sequences, options, getattr(torch, spec.dtype))
        for build in waiting:
            num_done += 1
            on_progress(build.add(layer, workbench, options, num_done, num_total))
    for build in builds:
        build.finish(spec, model_digest, digest, options)


class _Workbench:
    """What the jobs of one layer share: routed pairs to fit and to judge by, and the instant builds they start from."""

    def __init__(self, trace: LayerTrace, sequences: Tensor, options: UniteOptions, dtype: torch.dtype) -> None:
        count, num_tokens = sequences.shape
        fitted = count - max(1, round(count * options.held_out_frac))
        self.trace = trace.rows(0, fitted * num_tokens)
        self.pairs = routed_pairs(self.trace)
        self.held_out = routed_pairs(trace.rows(fitted * num_tokens, count * num_tokens))
        self._options, self._dtype = options, dtype
        self._starts: dict[int, tuple[str, UnitedLayer, float]] = {}

    def start(self, way: int) -> tuple[str, UnitedLayer, float]:
        """Name of the best grouping by held-out error after the instant build, that build, and its seconds."""
        if way not in self._starts:
            start_s, best = self._now_s(), ("", float("inf"))
            for name in self._options.groupings:
                grouping = make_grouping(name, way, self.trace)
                united = instant_build(self.trace, self.pairs, grouping)
                error = mean_error(routed_errors(united, self.held_out))
                if error < best[1]:
                    best, kept = (name, error), united
            self._starts[way] = (best[0], kept, self._now_s() - start_s)
        return self._starts[way]

    def build(self, way: int, method: str) -> tuple[str, UnitedLayer, float]:
        """(grouping, united experts in the checkpoint's dtype, seconds) by ``method``.

        All methods use the grouping of the instant build.
        """
        grouping_name, start, start_seconds = self.start(way)
        if method == "instant":
            return grouping_name, start.to(self._dtype), start_seconds
        start_s, grouping, options = self._now_s(), start.grouping, self._options.distil
        if method == "routed":
            united = distil(start, self.trace, self.pairs, options)
            start_s -= start_seconds
        elif method == "mixture":
            united = mixture_distil(self.trace, self.pairs, grouping, options)
        elif method == "frequency":
            united = frequency_average(self.trace, self.pairs, grouping)
        else:
            united = average(self.trace, grouping)
        return grouping_name, united.to(self._dtype), self._now_s() - start_s

    def _now_s(self) -> float:
        if self.trace.inputs.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def output_peak(self) -> tuple[float, ...]:
        return tuple(map(max, self.pairs.output_peak, self.held_out.output_peak))


class _JobState:
    """What one job has stored so far: layer files, and beside them what the manifest will say of each."""

    def __init__(self, job: Job, key: str, layers: dict[int, dict[str, Any]], finished: bool) -> None:
        self.job, self._key, self.layers, self.finished = job, key, layers, finished

    @classmethod
    def open(cls, job: Job, key: str) -> _JobState:
        path = job.directory / STATE_FILE
        finished = (job.directory / MANIFEST_FILE).exists()
        if not path.exists():
            if finished:
                raise ConfigError(f"{job.directory} holds united experts made elsewhere; allowed: an empty directory")
            return cls(job, key, {}, False)
        state = json.loads(path.read_text())
        if state["key"] != key:
            raise ConfigError(
                f"{job.directory} holds a build from another model, text or other options; remove it or name another"
            )
        layers = {int(layer): row for layer, row in state["layers"].items()}
        layers = {layer: row for layer, row in layers.items() if layer_file(job.directory, layer).exists()}
        return cls(job, key, layers, finished)

    def add(self, layer: int, workbench: _Workbench, options: UniteOptions, num_done: int, num_total: int) -> Progress:
        job = self.job
        grouping, united, seconds = workbench.build(job.way, job.method)
        errors = routed_errors(united, workbench.held_out)
        refused = [error > options.max_error for error in errors]
        self.layers[layer] = {
            "groups": united.grouping.groups,
            "held_out_error": errors,
            "do_not_use": refused,
            "weights_digest": write_layer(job.directory, layer, united.gate_up, united.down),
            "output_peak": workbench.output_peak(),
            "grouping": grouping,
            "seconds": seconds,
        }
        self._write()
        return Progress(job, layer, grouping, mean_error(errors), sum(refused), seconds, num_done, num_total)

    def finish(self, spec: ModelSpec, model_digest: str, calibration_digest: str, options: UniteOptions) -> None:
        """Write the manifest, which makes the directory an artefact."""
        rows = dict(sorted(self.layers.items()))
        UnitedManifest(
            way=self.job.way,
            method=self.job.method,
            model_digest=model_digest,
            calibration_digest=calibration_digest,
            num_experts=spec.num_experts,
            hidden_size=spec.hidden_size,
            expert_size=spec.expert_size,
            layers={
                layer: LayerGroups(
                    tuple(map(tuple, row["groups"])),
                    tuple(row["held_out_error"]),
                    tuple(row["do_not_use"]),
                    row["weights_digest"],
                )
                for layer, row in rows.items()
            },
            protect=super_experts({layer: row["output_peak"] for layer, row in rows.items()}),
            details={
                "seconds": sum(row["seconds"] for row in rows.values()),
                "held_out_error": mean_error([mean_error(row["held_out_error"]) for row in rows.values()]),
                "max_error": options.max_error,
                "grouping": {layer: row["grouping"] for layer, row in rows.items()},
                "torch": torch.__version__,
            },
        ).write(self.job.directory)

    def _write(self) -> None:
        path = self.job.directory / STATE_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"key": self._key, "layers": self.layers}))
        partial.replace(path)


def _key(job: Job, model_digest: str, calibration_digest: str, options: UniteOptions) -> str:
    """Two builds with one key give the same layers."""
    said = [job.way, job.method, model_digest, calibration_digest, asdict(options)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
