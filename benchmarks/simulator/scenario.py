"""A simulation's scenario file: fleet, plant, promise, traffic. A file may stand on another one, its ``base``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from benchmarks.scenario import REPOSITORY

SCENARIOS = REPOSITORY / "benchmarks/scenarios/simulator"


class SimulationError(ValueError):
    """A simulation that cannot be run, in one sentence."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LevelSection(_Section):
    """One level of the ladder: a measured table of the profile, or a mix of two."""

    name: str
    profile: str  # table of the profile file
    toward: str = ""  # second table
    share: float = Field(default=0.0, ge=0, le=1)  # of the way from the first table to the second
    prefill_frac: float = Field(default=1.0, gt=0, le=1)  # of a prompt token's compute that is left
    loss: float = Field(ge=0)  # nats per token


class PlantSection(_Section):
    """What the replicas are made of; errors are factors on the truth that the governor's profile does not know."""

    profile: str  # a results file, relative to the repository
    levels: tuple[LevelSection, ...] = Field(min_length=1)
    united_fade: dict[int, float] = {256: 1.0, 2048: 0.5, 8192: 0.0}  # tokens of a step -> share of the saving left
    overhead_s: float = Field(default=0.0, ge=0)
    saving_error: PositiveFloat = 1.0
    kv_error: PositiveFloat = 1.0

    @property
    def profile_path(self) -> Path:
        return REPOSITORY / self.profile

    @staticmethod
    def prefill_point(rates: Mapping[str, float]) -> tuple[float, float]:
        """(tokens of a step, tokens/s) of the measured prefill: "16x512" are 16 prompts of 512 tokens in one step."""
        name, rate = next(iter(rates.items()))
        num_prompts, length = name.split("x")
        return float(num_prompts) * float(length), rate


class FleetSection(_Section):
    replicas: PositiveInt = 1
    sample: PositiveInt = 64  # at most so many replicas are simulated; the others are taken to behave like them
    speeds: tuple[PositiveFloat, ...] = ()  # of the first replicas; 1: as profiled
    # load: the live router's policy; split: the first replica gets ``first_share`` of the requests, evenly spread over
    # time, the others share the rest by their queues.
    routing: Literal["load", "shortest_queue", "round_robin", "split"] = "load"
    first_share: float = Field(default=0.0, ge=0, le=1)

    @property
    def num_simulated(self) -> int:
        return min(self.replicas, self.sample)


class EngineSection(_Section):
    max_num_seqs: PositiveInt = 128
    max_num_batched_tokens: PositiveInt = 1024
    max_num_waiting: PositiveInt = 100_000
    num_blocks: PositiveInt = 14394
    block_size: PositiveInt = 16
    options: dict[str, Any] = {}  # further keys of the engine's scheduler section


class SloSection(_Section):
    ttft_s: PositiveFloat
    tpot_s: PositiveFloat


class RateSection(_Section):
    name: str
    duration_s: PositiveFloat
    load: PositiveFloat  # multiple of the fleet's capacity at level 0


class TraceSection(_Section):
    path: str  # relative to the repository
    speed: PositiveFloat = 1.0  # how much faster than recorded
    max_input_tokens: PositiveInt | None = None


class TrafficSection(_Section):
    """Either phases of Poisson arrivals with lengths drawn from quantiles, or a recorded trace."""

    phases: tuple[RateSection, ...] = ()
    arrival_cv: PositiveFloat = 1.0
    prompt_quantiles: tuple[float, ...] = ()  # tokens at evenly spaced quantiles from 0 to 1
    output_quantiles: tuple[float, ...] = ()
    trace: TraceSection | None = None
    full_frac: float = Field(default=0.0, ge=0, le=1)  # of requests in class ``full``

    @model_validator(mode="after")
    def _one_source(self) -> TrafficSection:
        if (self.trace is None) == (not self.phases):
            raise ValueError("traffic has either phases or a trace")
        if self.phases and not (self.prompt_quantiles and self.output_quantiles):
            raise ValueError("traffic with phases needs prompt_quantiles and output_quantiles")
        return self


class ScenarioFile(_Section):
    """One simulated scenario. Times in seconds, lengths in tokens."""

    name: str = ""
    description: str
    slo: SloSection
    plant: PlantSection
    fleet: FleetSection = FleetSection()
    engine: EngineSection = EngineSection()
    traffic: TrafficSection
    profile_error: PositiveFloat = 1.0  # the governor's profile is so many times the truth
    tick_s: PositiveFloat = 0.25
    network_delay_s: float = Field(default=0.002, ge=0)  # of telemetry, of settings, of published loads
    law_params: dict[str, dict[str, float]] = {}  # by law


def load_scenario(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> ScenarioFile:
    """A file, or the name of one in benchmarks/scenarios/simulator. SimulationError names file, key and fault.

    ``overrides`` have dotted keys: {"plant.kv_error": 2}.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SCENARIOS / f"{name_or_path}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in SCENARIOS.glob("*.yaml") if not p.stem.startswith("_")))
        raise SimulationError(f"there is no scenario {name_or_path!r}; there are {known}")
    try:
        document = _with_base(path)
        for key, value in (overrides or {}).items():
            for part in reversed(key.split(".")):
                value = {part: value}
            document = _merged(document, value)
        return ScenarioFile.model_validate({"name": path.stem, **document})
    except yaml.YAMLError as error:
        raise SimulationError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SimulationError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from error


def _with_base(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text())
    base = document.pop("base", None)
    return _merged(_with_base(path.parent / base), document) if base else document


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = dict(below)
    for key, value in above.items():
        is_section = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merged(both[key], value) if is_section else value
    return both
