"""Engines on the card, with a tiny model: kernels and graphs as they are served, steps recorded where a test asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine

UNDIMMED = BrownoutConfig(profile_repeats=0)
UNITED = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0)


def make_engine(checkpoint: Path, brownout: BrownoutConfig, dtype: str = "float32", **options: object) -> Engine:
    """``options`` replace fields of the configuration."""
    config = EngineConfig(
        ModelConfig(str(checkpoint), dtype=dtype),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512),
        cache=CacheConfig(num_blocks=512),
        brownout=brownout,
        kernels="triton",
        device="cuda",
    )
    return Engine(replace(config, **options))  # type: ignore[arg-type]


def record_logits(engine: Engine) -> list[Tensor]:
    """Grows by each step's logits [rows, V] from now on."""
    slot = engine.leave()
    assert slot.graphs is not None
    launch, recorded = slot.graphs.launch, []

    def launch_and_record(*args):  # type: ignore[no-untyped-def]
        step = launch(*args)
        recorded.append(step.logits.clone())
        return step

    slot.graphs.launch = launch_and_record  # type: ignore[method-assign]
    engine.take_up(slot)
    return recorded
