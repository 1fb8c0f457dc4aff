"""The least loss: nothing where level 0 carries the load, all where nothing less does, more the more arrives."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.simulator.least_loss import least_loss
from benchmarks.simulator.scenario import SimulationError, load_scenario
from benchmarks.simulator.traffic import Request, Traffic

FILE = str(Path(__file__).with_name("burst.yaml"))
BURST = load_scenario(FILE, {"engine.max_num_seqs": 128})
TOP_LOSS = BURST.plant.levels[-1].loss


def steady(req_s: float, duration_s: float = 20.0) -> Traffic:
    """Even arrivals; level 0 carries about 34 requests/s of this length, the top about 69."""
    count = int(req_s * duration_s)
    return Traffic(tuple(Request(i / req_s, 76, 272) for i in range(count)), duration_s)


def test_what_level_0_carries_costs_nothing() -> None:
    assert least_loss(BURST, steady(17.0)) == 0.0


def test_it_grows_with_the_load_up_to_the_top() -> None:
    losses = [least_loss(BURST, steady(req_s)) for req_s in (34.0, 42.0, 50.0, 58.0, 66.0)]
    assert all(less < more for less, more in pairwise(losses))
    assert losses[0] > 0 and losses[-1] < TOP_LOSS


def test_a_looser_promise_costs_less() -> None:
    loose = BURST.model_copy(update={"slo": BURST.slo.model_copy(update={"ttft_s": 2.0})})
    assert least_loss(loose, steady(50.0)) < least_loss(BURST, steady(50.0))


def test_one_replica_only() -> None:
    with pytest.raises(SimulationError, match="4 replicas"):
        least_loss(load_scenario(FILE, {"fleet.replicas": 4}), steady(17.0))
