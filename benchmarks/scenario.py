"""A scenario file: what a benchmark offers to which cluster."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from benchmarks.loadgen.closed_loop import ClosedLoop
from benchmarks.workloads.arrivals import RatePhase, draw_times
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import Arrival, Workload, endless, synthesize

REPOSITORY = Path(__file__).resolve().parents[1]


class ScenarioError(ValueError):
    """A scenario that cannot be run, in one sentence."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LengthSection(_Section):
    low: PositiveInt
    high: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> LengthSection:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; allowed: at most high ({self.high})")
        return self

    @property
    def range(self) -> LengthRange:
        return LengthRange(self.low, self.high)


class PhaseSection(_Section):
    name: str
    duration_s: PositiveFloat
    load: PositiveFloat  # multiple of the measured capacity


class CapacitySection(_Section):
    concurrency: PositiveInt
    ramp_s: float = Field(ge=0)
    measure_s: PositiveFloat

    @property
    def closed_loop(self) -> ClosedLoop:
        return ClosedLoop(self.concurrency, self.ramp_s, self.measure_s)


class SampleSection(_Section):
    """Prompts that a model of the cluster continues before the load comes, for people to read."""

    model: str
    prompts: tuple[str, ...] = Field(min_length=1)
    max_tokens: PositiveInt
    temperature: float = Field(ge=0)


class Scenario(_Section):
    """One burst scenario, for the first model of the Serve file; times in seconds, lengths in tokens."""

    serve_config: str  # relative to the repository
    seed: int = Field(ge=0)
    prompt_tokens: LengthSection
    output_tokens: LengthSection
    phases: tuple[PhaseSection, ...] = Field(min_length=1)
    arrival_cv: PositiveFloat = 1.0
    capacity: CapacitySection
    samples: SampleSection | None = None
    settle_s: float = Field(ge=0)
    request_timeout_s: PositiveFloat

    @property
    def serve_config_path(self) -> Path:
        return REPOSITORY / self.serve_config

    @property
    def peak_s(self) -> tuple[float, float]:
        """(start, end) of the phase with the highest load."""
        peak = max(range(len(self.phases)), key=lambda i: self.phases[i].load)
        start_s = sum(p.duration_s for p in self.phases[:peak])
        return start_s, start_s + self.phases[peak].duration_s

    def phase_of(self, at_s: float) -> int | None:
        """Index of the phase at a time of the run; None after the last."""
        ends_s = accumulate(p.duration_s for p in self.phases)
        return next((index for index, end_s in enumerate(ends_s) if at_s < end_s), None)

    def phase_at(self, at_s: float) -> str:
        """Name of that phase; "drain" after the last."""
        index = self.phase_of(at_s)
        return "drain" if index is None else self.phases[index].name

    def requests(self, vocab_size: int, seed_offset: int = 0) -> Iterator[Arrival]:
        """Requests of the scenario's lengths for a closed loop; runs with unequal offsets share no prompt."""
        seed = self.seed + seed_offset
        return endless(self.prompt_tokens.range, self.output_tokens.range, vocab_size, seed)

    def workload(self, capacity_req_s: float, vocab_size: int) -> Workload:
        """The arrivals for a server of that capacity; equal arguments give equal workloads."""
        phases = [RatePhase(p.duration_s, p.load * capacity_req_s) for p in self.phases]
        return synthesize(
            draw_times(phases, self.seed, self.arrival_cv),
            sum(p.duration_s for p in self.phases),
            self.prompt_tokens.range,
            self.output_tokens.range,
            vocab_size,
            self.seed,
        )


def load_scenario(path: Path) -> Scenario:
    """Raises ScenarioError, one sentence that names file, key and fault."""
    try:
        return Scenario.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ScenarioError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from error
