"""All that one loaded model dims with: its ladder, its united experts, and the dimmer that reads both."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import DEFAULT_LADDER, BrownoutConfig, ConfigError, EngineConfig, ModelConfig
from engine.models.spec import ModelSpec
from engine.moe.dimmer import Dimmer
from engine.moe.experts import PackedExperts
from engine.moe.ladder import LADDER_FILE, Ladder, default_ladder, read_ladder
from engine.moe.settings import USES_UNITED, DimmerKind
from engine.moe.similarity import read_similarity
from engine.moe.table import UnitedTable, rows_for
from engine.moe.united import AverageUnited, UnitedArtefact, UnitedLayers
from engine.weights.digest import model_digest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Dimming:
    """Belongs to a ModelSlot. ``dimmers`` has None for layers that are never dimmed."""

    ladder: Ladder
    dimmers: list[Dimmer | None]
    num_united: int  # rows for united experts in each dimmed layer's table
    united: dict[int, UnitedLayers]  # by way
    table: UnitedTable | None = None

    def load_united(self, experts: Mapping[int, PackedExperts]) -> None:
        """Fill the united rows of the model's tables, given by layer. Raises ArtefactError."""
        dimmed = {layer: experts[layer] for layer, dimmer in enumerate(self.dimmers) if dimmer is not None}
        if not dimmed:
            return
        self.table = UnitedTable(dimmed, self.dimmer.united_of)
        for way, source in self.united.items():
            self.table.make_room(way)
            for layer in dimmed:
                self.table.load_layer(source, layer)
            logger.info("%d-way united experts loaded into %d layers", way, len(dimmed))

    @property
    def dimmer(self) -> Dimmer:
        """The one that all dimmed layers share; only of a model that can dim."""
        return next(dimmer for dimmer in self.dimmers if dimmer is not None)

    @property
    def num_dimmed_layers(self) -> int:
        return sum(dimmer is not None for dimmer in self.dimmers)

    def protect(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Experts (layer, expert) that no dimmer may touch from now on."""
        for layer, expert in pairs:
            self.dimmer.protected[layer, expert] = True

    def adopt(self, source: UnitedLayers, ladder: Ladder) -> None:
        """United experts that are in place now, and the ladder in force from the next step on."""
        self.united[source.way] = source
        self.dimmer.set_settings(ladder.settings)
        self.ladder = ladder


def dimming_digest(model: ModelConfig) -> str:
    """Of the model that artefacts must belong to."""
    return model_digest(Path(model.path), model.seed if model.load_format == "random" else None)


def create_dimming(config: EngineConfig, spec: ModelSpec, device: torch.device) -> Dimming:
    """Raises ConfigError or ArtefactError, before any weight is read."""
    brownout = config.brownout
    directory = Path(config.model.path)
    if not spec.moe_layers:
        if brownout.ways or brownout.united_paths:
            named = f"ways is {list(brownout.ways)}" if brownout.ways else f"united is {brownout.united!r}"
            raise ConfigError(
                f"brownout.{named}, but {directory} is a dense model ({spec.architecture}), which has no experts to "
                "dim; allowed: none"
            )
        return Dimming(Ladder.exact(), [None] * spec.num_layers, 0, {})
    digest = dimming_digest(config.model)
    united = _united_sources(brownout, spec, directory, digest)
    ladder = _choose_ladder(brownout, spec, directory, united, digest)
    if len(ladder) == 1:
        return Dimming(ladder, [None] * spec.num_layers, 0, {})
    protected = _protected(brownout, spec, united)
    dimmed = set(spec.moe_layers) & set(range(brownout.exempt_first, spec.num_layers - brownout.exempt_last))
    if not dimmed:
        raise ConfigError(
            f"brownout.exempt_first is {brownout.exempt_first} and exempt_last {brownout.exempt_last}; allowed: fewer "
            f"than the model's {spec.num_layers} together, so that a layer with experts remains, or no ways at all"
        )
    num_united = max(brownout.united_rows or 0, rows_for(tuple(united), spec.num_experts))
    similarity = None
    if brownout.similarity:
        similarity = read_similarity(path_beside(brownout.similarity, directory), spec, digest)
    dimmer = Dimmer(ladder.settings, num_united, protected, spec.num_experts_per_token, device, similarity)
    return Dimming(
        ladder, [dimmer if layer in dimmed else None for layer in range(spec.num_layers)], num_united, united
    )


def _choose_ladder(
    brownout: BrownoutConfig, spec: ModelSpec, directory: Path, united: Mapping[int, UnitedLayers], digest: str
) -> Ladder:
    """The configured ladder, else ladder.json beside the model, else the unmeasured default of the dimmer."""
    kind = DimmerKind[brownout.dimmer.upper()]
    if kind is DimmerKind.EXACT or (kind in USES_UNITED and not united and not brownout.ladder):
        return Ladder.exact()
    path = path_beside(brownout.ladder or LADDER_FILE, directory)
    if brownout.ladder != DEFAULT_LADDER and path.exists():
        return check_ladder(read_ladder(path), path, united, digest, brownout.allow_unmeasured)
    if brownout.ladder and brownout.ladder != DEFAULT_LADDER:
        raise ConfigError(f"brownout.ladder is {brownout.ladder!r}, which does not exist; allowed: a ladder JSON")
    return default_ladder(kind, tuple(united), spec.num_experts_per_token)


def check_ladder(
    ladder: Ladder, path: Path, united: Mapping[int, UnitedLayers], digest: str, allow_unmeasured: bool
) -> Ladder:
    """The ladder if it is for this model and the loaded united experts. Raises ConfigError.

    One that was measured with other builds of united experts says nothing of these: it counts as unmeasured.
    """
    missing = ladder.ways - set(united)
    if missing:
        raise ConfigError(f"brownout.ways is {sorted(united)}; the ladder {path} also needs {sorted(missing)}")
    origin = ladder.provenance
    if origin is None:
        return ladder
    if origin.model_digest != digest:
        raise ConfigError(
            f"brownout.ladder {path} was measured on the model {origin.model_digest[:12]}; this one is {digest[:12]}"
        )
    loaded = {way: source.digest for way, source in united.items() if way in ladder.ways}
    if all(origin.united.get(way) == of_build for way, of_build in loaded.items()):
        return ladder
    if not allow_unmeasured:
        raise ConfigError(
            f"brownout.ladder {path} was measured with other united experts; allowed: the ones it names, a new "
            "brownoutserve calibrate, or brownout.allow_unmeasured"
        )
    return ladder.without_losses()


def _united_sources(brownout: BrownoutConfig, spec: ModelSpec, directory: Path, digest: str) -> dict[int, UnitedLayers]:
    """By way: what the configuration names, else averages for its ways."""
    if not brownout.united_paths:
        return {way: AverageUnited(way, spec.num_experts) for way in brownout.ways}
    sources: dict[int, UnitedLayers] = {}
    for path in brownout.united_paths:
        artefact = UnitedArtefact(path_beside(path, directory))
        artefact.check_fits(spec, digest, brownout.allowed_ways)
        if artefact.way in sources:
            raise ConfigError(f"brownout.united names two {artefact.way}-way builds; allowed: one for each way")
        sources[artefact.way] = artefact
    missing = set(brownout.ways) - set(sources)
    if missing:
        raise ConfigError(f"brownout.united has no build for brownout.ways {sorted(missing)}")
    return sources


def path_beside(path: str, model_directory: Path) -> Path:
    """A relative path is looked up beside the model first."""
    given = Path(path).expanduser()
    candidates = (model_directory / given, given)
    return next((candidate for candidate in candidates if candidate.exists()), candidates[0])


def _protected(brownout: BrownoutConfig, spec: ModelSpec, united: Mapping[int, UnitedLayers]) -> torch.Tensor:
    """[L, E]: experts that no dimmer touches, by configuration or because a build of united experts says so."""
    protected = torch.zeros(spec.num_layers, spec.num_experts, dtype=torch.bool)
    for layer, expert in brownout.protect:
        if not (0 <= layer < spec.num_layers and 0 <= expert < spec.num_experts):
            raise ConfigError(
                f"brownout.protect has ({layer}, {expert}); allowed: layers below {spec.num_layers}, "
                f"experts below {spec.num_experts}"
            )
        protected[layer, expert] = True
    for source in united.values():
        for layer, expert in source.protect:
            protected[layer, expert] = True
    return protected
