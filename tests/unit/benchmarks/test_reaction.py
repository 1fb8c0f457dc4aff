"""A burst's first dimmed step is found, and that there was none is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reaction import NUM_BURST, NUM_QUIET, one_burst, row_of, watch
from benchmarks.report import Slo
from benchmarks.workloads.lengths import LengthRange
from benchmarks.workloads.workload import endless
from engine.async_engine import AsyncEngine
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig
from engine.types import BrownoutSetting
from tests.models import write_config

LENGTHS = LengthRange(low=4, high=8)


@pytest.mark.parametrize("level", [0, 1])
async def test_the_first_dimmed_step_after_a_burst(tmp_path: Path, level: int) -> None:
    model = ModelConfig(str(write_config(tmp_path / "tiny")), load_format="random")
    brownout = BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)
    engine = await AsyncEngine.start(EngineConfig(model, CacheConfig(num_blocks=256), brownout=brownout))
    engine.apply_setting(BrownoutSetting.pinned(level))
    steps = watch(engine.brownout)
    reaction = await one_burst(engine, steps, endless(LENGTHS, LENGTHS, engine.info.vocab_size, seed=1))
    await engine.stop()
    assert len(reaction.records) == NUM_QUIET + NUM_BURST and all(r.completed for r in reaction.records)
    if level:
        assert (reaction.level, reaction.num_undimmed) == (level, 0)
        assert reaction.first_dimmed_s is not None and reaction.first_dimmed_s >= 0
    else:
        assert (reaction.level, reaction.first_dimmed_s) == (0, None)
        assert reaction.num_undimmed > 1
    row = row_of(1, reaction, Slo(1e6, 1e6))
    assert (row["live"], row["attainment"], row["reaction_s"]) == (True, 1.0, reaction.first_dimmed_s)
