"""Builds a model's ladder: measures candidate settings, keeps those that no other beats, aligns them into levels.

First every dimmer alone, then those combinations of two that these measurements give hope for. Losses are measured on
the plain torch kernels, step times on the kernels that serve. Every measurement is written down at once; a calibration
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.calibrate.candidates import StepSize, candidates, combinations, step_sizes, top_k_allocations
from engine.calibrate.cost import StepTimer
from engine.calibrate.frontier import align_levels, pareto_front
from engine.calibrate.profile import PROFILE_FILE, ProfileRow, QualityProfile
from engine.calibrate.quality import PASS_TOKENS, QualityMeter
from engine.config import (
    AVERAGE,
    DEFAULT_LADDER,
    BrownoutConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    require,
)
from engine.moe.dimming import dimming_digest
from engine.moe.ladder import LADDER_FILE, Bucket, Ladder, Provenance
from engine.moe.settings import DimmerKind, DimSetting
from engine.pool.slots import ModelSlot, load_slot
from engine.unite.calibration import sequences_digest

Work = list[tuple[StepSize, DimSetting]]

KINDS = (DimmerKind.UNITED, DimmerKind.PIGGYBACK, DimmerKind.TOPK)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """``max_loss``: the strongest level's budget, nats per token. ``kinds``: dimmers to try."""

    united: tuple[str, ...] = ()  # as brownout.united
    similarity: str = ""
    decode_sizes: tuple[int, ...] = (8, 32, 128)
    prefill_sizes: tuple[int, ...] = (2048,)
    kinds: tuple[DimmerKind, ...] = KINDS
    exempt_first: int = 2
    exempt_last: int = 2
    num_levels: int = 10
    max_loss: float = 0.3
    repeats: int = 5
    device: str = "auto"

    def __post_init__(self) -> None:
        require(
            bool(self.decode_sizes) and min(self.decode_sizes) >= 1, "--decode", self.decode_sizes, "1 or more rows"
        )
        require(
            bool(self.prefill_sizes) and min(self.prefill_sizes) >= 1,
            "--prefill",
            self.prefill_sizes,
            "1 or more tokens",
        )
        require(2 <= self.num_levels <= 32, "--levels", self.num_levels, "2 to 32")
        require(self.max_loss > 0, "--max-loss", self.max_loss, "a positive number of nats")
        require(self.repeats >= 1, "--repeats", self.repeats, "1 or more")


@dataclass(frozen=True, slots=True)
class Progress:
    """One measurement is done."""

    num_done: int
    num_total: int
    said: str


@dataclass(slots=True)
class Calibration:
    """What one run measures, and where it writes."""

    model: ModelConfig
    sequences: Tensor  # [S, T], held out
    directory: Path
    options: CalibrateOptions
    details: dict[str, Any] = field(default_factory=dict)  # for the ladder's provenance: text, command
    on_progress: Callable[[Progress], None] = lambda progress: None
    _slot: ModelSlot | None = field(default=None, init=False)
    _kernels: str = field(default="", init=False)  # what _slot runs on
    _num_done: int = field(default=0, init=False)
    _num_total: int = field(default=0, init=False)

    def run(self) -> Ladder:
        """Writes ladder.json and quality_profile.json. Raises ConfigError or CheckpointError."""
        sizes = step_sizes(self.options.decode_sizes, self.options.prefill_sizes)
        digest = dimming_digest(self.model)
        united = {way: source.digest for way, source in self._on("torch").dimming.united.items()}
        profile = QualityProfile.open(self.directory / PROFILE_FILE, self._key(digest, united))
        self._measure(self._alone(sizes, profile), profile)
        self._measure(self._combined(sizes, profile), profile)
        fronts = {size: pareto_front([row.level for row in profile.of(size).values()]) for size in sizes}
        levels = align_levels(fronts, self.options.num_levels, self.options.max_loss)
        ladder = Ladder(
            tuple(Bucket(size.phase, size.max_tokens, levels[size]) for size in sizes),
            Provenance(digest, united, dict(profile.key) | self.details),
        )
        ladder.write(self.directory / LADDER_FILE)
        return ladder

    def _key(self, digest: str, united: dict[int, str]) -> dict[str, Any]:
        device = self._on("torch").device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return {
            "model_digest": digest,
            "united": {str(way): build for way, build in united.items()},
            "text_digest": sequences_digest(self.sequences),
            "num_sequences": self.sequences.shape[0],
            "num_tokens": self.sequences.shape[1],
            "exempt": [self.options.exempt_first, self.options.exempt_last],
            "device": card,
            "torch": torch.__version__,
        }

    def _alone(self, sizes: Sequence[StepSize], profile: QualityProfile) -> Work:
        """Every dimmer by itself, at every step size."""
        slot, kinds = self._on("torch"), self.options.kinds
        allocations = self._allocate(slot, sizes[-1], profile) if DimmerKind.TOPK in kinds else []
        ways, spec, top_k = tuple(slot.dimming.united), slot.spec, slot.spec.num_experts_per_token
        return [
            (size, setting)
            for size in sizes
            for setting in dict.fromkeys(candidates(size, ways, spec.num_experts, top_k, allocations, kinds))
        ]

    def _allocate(self, slot: ModelSlot, size: StepSize, profile: QualityProfile) -> list[tuple[int, ...]]:
        """Experts per token for each layer, by what each layer alone loses with fewer."""
        meter = QualityMeter(slot, self.sequences)
        top_k, num_layers = slot.spec.num_experts_per_token, slot.spec.num_layers
        cuts = [(layer, k) for layer in meter.layers for k in range(1, top_k)]
        for layer, k in self._remaining(
            cuts, [(layer, k) for layer, k in cuts if f"{layer}/{k}" in profile.sensitivity]
        ):
            one_layer = tuple(k if index == layer else top_k for index in range(num_layers))
            quality = meter.measure(DimSetting(DimmerKind.TOPK, top_k=one_layer), size)
            profile.sensitivity[f"{layer}/{k}"] = quality.loss
            self._done(profile, f"layer {layer} with {k} of {top_k} experts: loss {quality.loss:.4f}")
        losses = [
            [max(profile.sensitivity[f"{layer}/{k}"], 0.0) for k in range(1, top_k)] + [0.0] for layer in meter.layers
        ]
        return top_k_allocations(losses, meter.layers, num_layers, top_k)

    def _combined(self, sizes: Sequence[StepSize], profile: QualityProfile) -> Work:
        """Dimmers over fewer experts per token, where what was measured alone gives hope."""
        alone = {
            size: [
                row.level
                for row in profile.of(size).values()
                if row.setting.kind is DimmerKind.TOPK or not row.setting.top_k
            ]
            for size in sizes
        }
        return [(size, setting) for size in sizes for setting in combinations(alone[size], self.options.max_loss)]

    def _measure(self, work: Work, profile: QualityProfile) -> None:
        """Losses first, then step times."""
        if any(setting not in profile.of(size) for size, setting in work):
            self._measure_losses(work, profile)
        if any(profile.of(size)[setting].step_frac is None for size, setting in work):
            self._measure_times(work, profile)

    def _measure_losses(self, work: Work, profile: QualityProfile) -> None:
        meter = QualityMeter(self._on("torch"), self.sequences)
        for size, setting in self._remaining(work, [(s, c) for s, c in work if c in profile.of(s)]):
            row = _same_at_any_size(setting, profile)
            if row is None:
                quality = meter.measure(setting, size)
                row = ProfileRow(setting, quality.loss, quality.se, quality.kl, quality.experts, quality.exact_experts)
            profile.of(size)[setting] = row
            said = f"{size.name}, {setting.name}: loss {row.loss:.4f} +- {row.se:.4f}, {row.experts:.1f} experts"
            self._done(profile, said)

    def _measure_times(self, work: Work, profile: QualityProfile) -> None:
        timer = StepTimer(self._on("auto"), self.sequences, self.options.repeats)
        timed = [(size, setting) for size, setting in work if profile.of(size)[setting].step_frac is not None]
        for size, setting in self._remaining(work, timed):
            frac = timer.step_frac(setting, size)
            profile.of(size)[setting] = replace(profile.of(size)[setting], step_frac=frac)
            self._done(profile, f"{size.name}, {setting.name}: {frac:.3f} of the step time")

    def _remaining(self, work: Sequence[Any], done: Sequence[Any]) -> Iterator[Any]:
        """The work not done yet; tells the progress of all of it."""
        self._num_done, self._num_total = len(done), len(work)
        for item in work:
            if item not in done:
                self._num_done += 1
                yield item

    def _done(self, profile: QualityProfile, said: str) -> None:
        profile.write(self.directory / PROFILE_FILE)
        self.on_progress(Progress(self._num_done, self._num_total, said))

    def _on(self, kernels: str) -> ModelSlot:
        """The model on these kernels; one at a time lies in the device's memory. A CPU has the plain ones only."""
        if self._slot is None or (self._slot.device.type == "cuda" and self._kernels != kernels):
            self._slot = None
            gc.collect()  # a slot's graphs and model may know each other
            torch.cuda.empty_cache()
            self._slot, self._kernels = self._load(kernels), kernels
        return self._slot

    def _load(self, kernels: str) -> ModelSlot:
        """The model with every united build, and KV blocks for one pass of the text."""
        options, cache = self.options, CacheConfig()
        num_tokens = self.sequences.shape[1]
        max_rows = max(options.decode_sizes)
        max_tokens = max(*options.prefill_sizes, max_rows * num_tokens, PASS_TOKENS) + num_tokens
        num_blocks = -(-max_tokens // num_tokens) * -(-num_tokens // cache.block_size) + 1
        brownout = BrownoutConfig(
            united=options.united or AVERAGE,
            dimmer="topk",
            similarity=options.similarity,
            ladder=DEFAULT_LADDER,
            exempt_first=options.exempt_first,
            exempt_last=options.exempt_last,
            allow_unmeasured=True,
        )
        num_prompts = -(-max(options.prefill_sizes) // num_tokens)
        scheduler = SchedulerConfig(
            max_num_seqs=max(max_rows, num_prompts),
            max_num_batched_tokens=max(max_rows * num_tokens, num_prompts * num_tokens),
        )
        return load_slot(
            EngineConfig(
                self.model,
                CacheConfig(num_blocks=num_blocks, prefix_caching=False),
                scheduler,
                brownout=brownout,
                device=options.device,
                kernels=kernels,
                cuda_graphs=kernels != "torch",
            ),
            any_dimmer=True,
        )


def _same_at_any_size(setting: DimSetting, profile: QualityProfile) -> ProfileRow | None:
    """What fewer experts per token lose does not depend on the step; how long it takes does."""
    if setting.kind is not DimmerKind.TOPK:
        return None
    measured = next((rows[setting] for rows in profile.rows.values() if setting in rows), None)
    return None if measured is None else replace(measured, step_frac=None)
