"""United experts: one expert that stands for several (BrownoutServe, arXiv 2507.17133), and how a model's are stored.

Legend: E original experts, U united experts, D hidden size, F expert FFN width.

An artefact is a directory: ``united.json`` says what it is, ``layer-NN.safetensors`` holds the united experts of one
layer as ``gate_up`` [U, 2F, D] and ``down`` [U, D, F]. It belongs to one model and one way, and is refused as a whole,
in one sentence, if anything in it does not fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.models.spec import ModelSpec
from engine.moe.experts import PackedExperts
from engine.weights.digest import file_digest
from engine.weights.manifest import CheckpointError

FORMAT = "brownoutserve-united-1"
MANIFEST_FILE = "united.json"


class ArtefactError(CheckpointError):
    """United experts that cannot be used, in one sentence that names the file and the reason."""


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which originals each united expert of one way stands for."""

    way: int
    groups: tuple[tuple[int, ...], ...]


def consecutive_groups(num_experts: int, way: int) -> Grouping:
    """Balanced groups of neighbours: sizes differ by at most one and never exceed ``way``."""
    num_groups = num_united(num_experts, way)
    bounds = [num_experts * g // num_groups for g in range(num_groups + 1)]
    return Grouping(way, tuple(tuple(range(a, b)) for a, b in pairwise(bounds)))


def num_united(num_experts: int, way: int) -> int:
    """Rows of the packed table that one way may take in a layer."""
    return -(-num_experts // way)


@dataclass(frozen=True, slots=True)
class LayerGroups:
    """One layer of an artefact; entry u of each tuple belongs to united expert u."""

    groups: tuple[tuple[int, ...], ...]  # members; an original in no group is never dimmed by this artefact
    held_out_error: tuple[
        float | None, ...
    ]  # squared error over held-out routed pairs, relative to the members' output
    do_not_use: tuple[bool, ...]  # the error is too high: the members keep their originals
    weights_digest: str  # of the layer's file


@dataclass(frozen=True)
class UnitedManifest:
    """What ``united.json`` says."""

    way: int
    method: str  # how the weights came about: "routed", "instant", "mixture", "average", ...
    model_digest: str  # engine.weights.digest of the model that they belong to
    calibration_digest: str  # of the calibration text
    num_experts: int
    hidden_size: int
    expert_size: int
    layers: Mapping[int, LayerGroups]  # layers without united experts are missing
    protect: tuple[tuple[int, int], ...] = ()  # (layer, expert) pairs that no dimmer may touch
    details: Mapping[str, Any] = field(default_factory=dict)  # of the build, for people: seconds, losses, versions

    @cached_property
    def digest(self) -> str:
        """Names this build: manifest and weights."""
        return hashlib.sha256(_to_json(self).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Last, after the layers: a directory without its manifest is an unfinished build."""
        _replace_text(directory / MANIFEST_FILE, _to_json(self) + "\n")


class UnitedLayers(Protocol):
    """United experts of one way, layer by layer: stored ones, or such as are made from the originals at start."""

    way: int
    digest: str  # names the build
    protect: tuple[tuple[int, int], ...]  # (layer, expert) pairs that no dimmer may touch

    def groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Members of each united expert that may be used; () for one that may not, and for a layer without any."""

    def weights(self, layer: int, experts: PackedExperts) -> tuple[Tensor, Tensor]:
        """gate_up [U, 2F, D] and down [U, D, F], one for each of ``groups``. Raises ArtefactError."""


class AverageUnited:
    """Plain averages of neighbours. A baseline: averaging unaligned experts loses as much as dropping them."""

    def __init__(self, way: int, num_experts: int) -> None:
        self.way = way
        self.digest = f"average-{way}"
        self.protect: tuple[tuple[int, int], ...] = ()
        self._groups = consecutive_groups(num_experts, way).groups

    def groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        return self._groups

    def weights(self, layer: int, experts: PackedExperts) -> tuple[Tensor, Tensor]:
        gate_up, down = (
            torch.stack([table[list(members)].float().mean(0).to(table.dtype) for members in self._groups])
            for table in (experts.gate_up, experts.down)
        )
        return gate_up, down


class UnitedArtefact:
    """United experts on disk, read one layer at a time and checked each time."""

    def __init__(self, directory: Path) -> None:
        """Reads the manifest. Raises ArtefactError if it is missing or says nonsense."""
        self.directory = directory
        self.manifest = read_manifest(directory)
        self.way = self.manifest.way
        self.digest = self.manifest.digest
        self.protect = self.manifest.protect

    def check_fits(self, spec: ModelSpec, digest: str, ways: tuple[int, ...]) -> None:
        """Raises ArtefactError unless the manifest is for this model and for one of ``ways``."""
        manifest = self.manifest
        if manifest.way not in ways:
            self._refuse(f"are {manifest.way}-way; allowed here: {', '.join(f'{way}-way' for way in ways)}")
        for name in ("num_experts", "hidden_size", "expert_size"):
            if getattr(manifest, name) != getattr(spec, name):
                self._refuse(f"have {name} {getattr(manifest, name)}; the model has {getattr(spec, name)}")
        last = max([*manifest.layers, *(layer for layer, _ in manifest.protect)])
        if last >= spec.num_layers:
            self._refuse(f"have a layer {last}; the model has {spec.num_layers} layers")
        if manifest.model_digest != digest:
            self._refuse(f"were built for the model {manifest.model_digest[:12]}; this one is {digest[:12]}")

    def check_weights(self) -> None:
        """Read every layer once and keep none, so that loading cannot fail half-way. Raises ArtefactError."""
        for layer in self.manifest.layers:
            self.read(layer)

    def groups(self, layer: int) -> tuple[tuple[int, ...], ...]:
        stored = self.manifest.layers.get(layer)
        if stored is None:
            return ()
        return tuple(() if bad else members for members, bad in zip(stored.groups, stored.do_not_use, strict=True))

    def weights(self, layer: int, experts: PackedExperts) -> tuple[Tensor, Tensor]:
        return self.read(layer)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """gate_up [U, 2F, D] and down [U, D, F] of a layer that has any, checked. Raises ArtefactError."""
        manifest, path = self.manifest, layer_file(self.directory, layer)
        stored = manifest.layers[layer]
        width, size, count = manifest.hidden_size, manifest.expert_size, len(stored.groups)
        try:
            if file_digest(path) != stored.weights_digest:
                self._refuse(f"are damaged: {path.name} is not the file that {MANIFEST_FILE} was written for")
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in ("gate_up", "down")}
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"united experts {self.directory} cannot be read: {path.name}: {error}") from error
        for name, shape in (("gate_up", (count, 2 * size, width)), ("down", (count, width, size))):
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                self._refuse(f"have {name} of shape {tuple(tensor.shape)} in {path.name}; its manifest implies {shape}")
            if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
                self._refuse(f"have weights that are not finite numbers: {name} in {path.name}")
        return tensors["gate_up"], tensors["down"]

    def _refuse(self, reason: str) -> None:
        raise ArtefactError(f"united experts {self.directory} {reason}")


def layer_file(directory: Path, layer: int) -> Path:
    return directory / f"layer-{layer:02d}.safetensors"


def write_layer(directory: Path, layer: int, gate_up: Tensor, down: Tensor) -> str:
    """Store one layer's united experts [U, 2F, D] and [U, D, F]; returns the digest for its LayerGroups. Atomic."""
    directory.mkdir(parents=True, exist_ok=True)
    path = layer_file(directory, layer)
    partial = path.with_suffix(".partial")
    save_file({"gate_up": gate_up.contiguous().cpu(), "down": down.contiguous().cpu()}, partial)
    partial.replace(path)
    return file_digest(path)


def read_manifest(directory: Path) -> UnitedManifest:
    """Raises ArtefactError for a manifest that is missing, of another format or inconsistent in itself."""
    path = directory / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"format is {raw['format']!r}; allowed: {FORMAT!r}")
        layers = {int(layer): _layer_groups(content) for layer, content in raw["layers"].items()}
        manifest = UnitedManifest(
            way=int(raw["way"]),
            method=str(raw["method"]),
            model_digest=str(raw["model_digest"]),
            calibration_digest=str(raw["calibration_digest"]),
            num_experts=int(raw["num_experts"]),
            hidden_size=int(raw["hidden_size"]),
            expert_size=int(raw["expert_size"]),
            layers=dict(sorted(layers.items())),
            protect=tuple((int(layer), int(expert)) for layer, expert in raw["protect"]),
            details=raw.get("details", {}),
        )
        _check_groups(manifest)
    except FileNotFoundError as error:
        raise ArtefactError(f"united experts {directory} have no {MANIFEST_FILE}") from error
    except KeyError as error:
        raise ArtefactError(
            f"united experts {directory} cannot be used: {MANIFEST_FILE} lacks the key {error}"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtefactError(f"united experts {directory} cannot be used: {MANIFEST_FILE}: {error}") from error
    return manifest


def _layer_groups(content: Mapping[str, Any]) -> LayerGroups:
    return LayerGroups(
        groups=tuple(tuple(int(expert) for expert in members) for members in content["groups"]),
        held_out_error=tuple(None if e is None else float(e) for e in content["held_out_error"]),
        do_not_use=tuple(bool(flag) for flag in content["do_not_use"]),
        weights_digest=str(content["weights_digest"]),
    )


def _check_groups(manifest: UnitedManifest) -> None:
    """ValueError unless each layer's groups are disjoint, not larger than the way, and complete in their tuples."""
    if not manifest.layers:
        raise ValueError("it has no layers")
    for layer, stored in manifest.layers.items():
        count, limit = len(stored.groups), num_united(manifest.num_experts, manifest.way)
        members = [expert for group in stored.groups for expert in group]
        if not len(stored.held_out_error) == len(stored.do_not_use) == count:
            raise ValueError(f"layer {layer} has {count} groups, but not as many errors and flags")
        if not 1 <= count <= limit:
            raise ValueError(f"layer {layer} has {count} groups; allowed for {manifest.way}-way: 1 to {limit}")
        if any(not 1 <= len(group) <= manifest.way for group in stored.groups):
            raise ValueError(f"layer {layer} has a group of another size than 1 to {manifest.way}")
        if len(set(members)) != len(members) or not set(members) <= set(range(manifest.num_experts)):
            raise ValueError(f"layer {layer} has an expert twice, or one that is not among {manifest.num_experts}")
    if any(layer < 0 or not 0 <= expert < manifest.num_experts for layer, expert in manifest.protect):
        raise ValueError("protect names an expert that is not there")


def _to_json(manifest: UnitedManifest) -> str:
    return json.dumps({"format": FORMAT} | asdict(manifest), indent=1)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
