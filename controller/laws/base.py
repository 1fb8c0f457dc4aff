"""What a control law is, and the table of those that exist. Laws know no clock, no Redis and no replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol, TypeVar

from controller.types import Decision, Observation, Slo

LAWS = ("predictive", "pi", "aimd", "static")

State = TypeVar("State")


class LawError(ValueError):
    """A law or a parameter that does not exist or cannot work, in one sentence."""


class Law(Protocol[State]):
    """``step(state, observation, now_s) -> (state, decision)``: the same object serves, replays and simulates.

    ``now_s`` comes from any clock that does not go back. A decision stays in force until the next differs. Every level
    of a decision lies in [0, observation.num_levels - 1]. Missing data is unknown, never idle and never an overload.
    """

    name: str
    window_s: float | None  # how much of the past it wants to observe; None: the controller's default

    def initial(self, last: Decision | None = None) -> State:
        """The state to begin with; ``last`` is the decision in force, from this law or another."""
        ...

    def step(self, state: State, observation: Observation, now_s: float) -> tuple[State, Decision]: ...


def create_law(name: str, slo: Slo, params: Mapping[str, float] | None = None) -> Law[Any]:
    """The law called ``name``; ``params`` overrides fields of its parameter class. LawError on an unknown one."""
    params = params or {}
    if name == "static":
        from controller.laws.static import StaticLaw, StaticParams

        return StaticLaw(slo, _filled(name, StaticParams, params))
    if name == "aimd":
        from controller.laws.aimd import AimdLaw, AimdParams

        return AimdLaw(slo, _filled(name, AimdParams, params))
    if name == "pi":
        from controller.laws.pi import PiLaw, PiParams

        return PiLaw(slo, _filled(name, PiParams, params))
    if name == "predictive":
        from controller.laws.predictive import PredictiveLaw, PredictiveParams

        return PredictiveLaw(slo, _filled(name, PredictiveParams, params))
    raise LawError(f"law is {name!r}; allowed: {', '.join(LAWS)}")


Params = TypeVar("Params")


def _filled(law: str, kind: type[Params], params: Mapping[str, float]) -> Params:
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    for key, value in params.items():
        if key not in known:
            raise LawError(f"law {law!r} has no parameter {key!r}; allowed: {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LawError(f"parameter {key!r} of law {law!r} is {value!r}; allowed: a number")
    return kind(**params)
