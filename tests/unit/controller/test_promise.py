"""What a request that arrived now could expect, from what the replicas report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controller.arbiter import ArbiterReason, Rung
from controller.config import ControllerConfig
from controller.model_control import ModelControl, Policy
from controller.promise import observe_promise
from controller.reports import Hello, StepWindow
from controller.types import Decision, Observation, PhaseDecision, PhaseObservation, Reason, Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
HELLO = Hello("a", "model", 1, 3, True, level_loss=(0.0, 0.1, 0.2), max_num_seqs=32, max_num_batched_tokens=256)
WINDOW = StepWindow("a", "model", 1, 1, 0.25, predicted_step_time_s=(0.1, 0.08, 0.05))
ANSWERS_OF_64 = Observation(num_finished=10, decode=PhaseObservation(num_steps=9, num_tokens=640))


def decision(ceiling: int = 2) -> Decision:
    phase = PhaseDecision(0, ceiling, 1.0, 0.5)
    return Decision(phase, phase, "predictive", Reason.HEADROOM)


@pytest.mark.parametrize(
    ("load", "ceiling", "level0_s", "dimmed_s"),
    [
        pytest.param({}, 2, 0.1, 0.05, id="idle-one-step"),
        pytest.param({"queued_prefill_tokens": 2560}, 2, 1.1, 0.55, id="ten-chunks-ahead"),
        pytest.param({"num_waiting": 10}, 2, 2.1, 1.05, id="ten-places-of-two-steps-ahead"),
        pytest.param({"num_waiting": 10}, 1, 2.1, 1.68, id="only-as-deep-as-allowed"),
        pytest.param({"num_waiting": 10}, 0, 2.1, 2.1, id="off"),
    ],
)
def test_predicted_ttft(load: dict[str, Any], ceiling: int, level0_s: float, dimmed_s: float) -> None:
    seen = observe_promise({"a": HELLO}, [replace(WINDOW, **load)], ANSWERS_OF_64, decision(ceiling), SLO)
    assert seen.ttft_level0_s == pytest.approx(level0_s)
    assert seen.ttft_dimmed_s == pytest.approx(dimmed_s)


def test_the_least_loaded_replica_counts_and_unknown_stays_unknown() -> None:
    busy, idle = replace(WINDOW, num_waiting=50), replace(WINDOW, replica_id="b")
    hellos = {"a": HELLO, "b": replace(HELLO, replica_id="b")}
    seen = observe_promise(hellos, [busy, idle], ANSWERS_OF_64, decision(), SLO)
    assert seen.ttft_dimmed_s == pytest.approx(0.05)
    assert seen.drain_s > 1
    assert observe_promise(hellos, [], ANSWERS_OF_64, decision(), SLO).ttft_level0_s is None


@pytest.mark.parametrize(
    ("num_waiting", "rungs", "reason"),
    [
        (0, (), ArbiterReason.KEPT),
        (8, (Rung.DIM,), ArbiterReason.DIMMING_CARRIES),
        (40, (Rung.DIM, Rung.SHED), ArbiterReason.AT_CAPACITY),
    ],
)
def test_the_control_says_what_the_promise_calls_for(
    num_waiting: int, rungs: tuple[Rung, ...], reason: ArbiterReason
) -> None:
    control = ModelControl("model", ControllerConfig(slo=SLO), Policy("predictive"), epoch=1)
    control.join(HELLO, 0.0)
    control.window.offer(replace(WINDOW, num_waiting=num_waiting), 0.1)
    control.tick(0.2)
    assert control.measures is not None
    assert (control.measures.rungs, control.measures.reason) == (rungs, reason)
