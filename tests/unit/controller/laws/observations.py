"""Observations for the tests of laws."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from controller.types import Observation, PhaseObservation, Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def observed(
    prefill_p90_s: float | None = None,
    decode_p90_s: float | None = None,
    level_mean: float = 0.0,
    num_levels: int = 11,
    **fields: Any,
) -> Observation:
    """One fresh replica whose phases had the given P90 step times and mean level; None: no step of that phase."""
    phases = {
        name: PhaseObservation(
            num_steps=0 if p90_s is None else 10,
            num_tokens=0 if p90_s is None else 100,
            step_time_p90_s=p90_s,
            level_mean=level_mean,
        )
        for name, p90_s in (("prefill", prefill_p90_s), ("decode", decode_p90_s))
    }
    defaults = {"num_replicas": 1, "num_levels": num_levels, "ladder_measured": True, "level_now": level_mean}
    return Observation(**{**defaults, **phases, **fields})


latencies_s = st.one_of(st.none(), st.floats(1e-4, 10.0))

observations = st.builds(
    observed,
    prefill_p90_s=latencies_s,
    decode_p90_s=latencies_s,
    level_mean=st.floats(0, 12),
    num_levels=st.integers(1, 12),
    num_stale=st.integers(0, 1),
    ttft_p90_s=latencies_s,
    tpot_p90_s=latencies_s,
    oldest_wait_s=st.floats(0, 10),
    num_waiting=st.integers(0, 100),
)
