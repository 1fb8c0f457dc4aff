"""An engine's stats at one moment, from its scheduler and its brownout; simulated replicas ask it too. Pure."""

from __future__ import annotations

from itertools import chain

from engine.brownout import Brownout
from engine.scheduler.scheduler import Scheduler
from engine.types import EngineStats, Levels


def stats_of(
    scheduler: Scheduler,
    brownout: Brownout,
    now_s: float,
    num_preemptions: int,
    num_steps: int = 0,
    num_tokens: int = 0,
) -> EngineStats:
    """``num_...``: counted since the start by whoever runs the steps."""
    levels = brownout.levels if scheduler.has_work else Levels()
    held = chain(scheduler.running, scheduler.waiting.heads())
    no_token = [sequence.arrival_s for sequence in held if sequence.first_token_s is None]
    return EngineStats(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        max_num_seqs=scheduler.max_num_seqs,
        queued_prefill_tokens=scheduler.queued_prefill_tokens,
        oldest_wait_s=now_s - min(no_token) if no_token else 0.0,
        kv_used_frac=scheduler.blocks.used_frac,
        num_free_blocks=scheduler.blocks.num_free,
        levels=levels,
        predicted_step_s=brownout.predicted_step_s(levels.peak),
        num_preemptions=num_preemptions,
        num_steps=num_steps,
        num_tokens=num_tokens,
        setting_version=brownout.newest.version,
        lease_expired=brownout.lease_expired(now_s),
    )
