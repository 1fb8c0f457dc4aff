from __future__ import annotations

import pickle
from typing import Any

import pytest

from engine.types import (
    BrownoutSetting,
    BrownoutUsage,
    EngineBusyError,
    InvalidRequestError,
    Levels,
    Phase,
    PhaseSetting,
    SamplingParams,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("param", "bad"),
    [
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1, 17]),
        ("temperature", [-0.1, 2.1, NAN]),
        ("top_p", [0.0, 1.1, NAN]),
        ("top_k", [-2]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("repetition_penalty", [0.0, 2.1, NAN]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("logit_bias", [((-1, 0.0),), ((1, 100.1),), ((1, NAN),)]),
        ("logprobs", [-1, 21]),
        ("stop", [("",), ("a",) * 17]),
    ],
)
def test_a_bad_sampling_value_names_its_field(param: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InvalidRequestError) as refusal:
            SamplingParams(**{param: value})
        assert refusal.value.param == param
        assert str(refusal.value).startswith(f"{param} ")
        assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    "good",
    [
        {"max_tokens": 1, "min_tokens": 1},
        {"temperature": 0},
        {"temperature": 2, "top_p": 1.0, "top_k": -1, "min_p": 1},
        {"logprobs": 0},
        {"logprobs": 20, "stop": ("a",) * 16},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 2},
        {"logit_bias": ((0, -100), (5, 100))},
    ],
)
def test_the_limits_themselves_are_allowed(good: dict[str, Any]) -> None:
    assert SamplingParams(**good).greedy == (good.get("temperature") == 0)


@pytest.mark.parametrize("error", [InvalidRequestError("stop is bad", "stop"), EngineBusyError("full", 2.5)])
def test_errors_keep_their_fields_across_processes(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


@pytest.mark.parametrize(
    ("floor", "ceiling", "budget_s", "margin"),
    [(-1, 0, 1.0, 0.9), (2, 1, 1.0, 0.9), (0, 1, 0.0, 0.9), (0, 1, NAN, 0.9), (0, 1, 1.0, 0.0)],
)
def test_an_impossible_phase_setting_is_refused(floor: int, ceiling: int, budget_s: float, margin: float) -> None:
    with pytest.raises(ValueError, match="must"):
        PhaseSetting(floor, ceiling, budget_s, margin)


def test_levels_and_shares() -> None:
    levels = Levels(prefill=3, decode=1)
    assert (levels.of(Phase.PREFILL), levels.of(Phase.DECODE), levels.peak) == (3, 1, 3)
    assert BrownoutUsage().dimmed_share == 0.0
    assert BrownoutUsage(routed_pairs=8, dimmed_pairs=2).dimmed_share == 0.25
    assert BrownoutSetting.pinned(2).prefill.floor == BrownoutSetting.pinned(2).decode.ceiling == 2
