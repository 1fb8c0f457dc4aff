"""Which replica a request goes to: filter, score in [0, 1], pick. Pure: no Redis, no Ray, no clock.

| replicas                                             | answer                                        |
|------------------------------------------------------|-----------------------------------------------|
| none with a live load                                | None: no opinion, Serve chooses               |
| some with a live load, some without                  | only those with one; the others go last       |
| equal but for requests held (own picks included)     | fewest first                                  |
| equal but for queued prefill tokens                  | fewest first                                  |
| equal but for KV blocks in use                       | most room first                               |
| all equal                                            | drawn at random                               |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WEIGHT_SLOTS = 0.6  # requests held decide most: each costs a share of every later step
WEIGHT_PREFILL = 0.2
WEIGHT_KV = 0.2


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's last published load. ``sequence`` grows by one with each publication."""

    sequence: int
    num_running: int
    num_waiting: int
    max_num_seqs: int
    queued_prefill_tokens: int
    max_num_batched_tokens: int
    kv_used_frac: float


def rank(
    replica_ids: Sequence[str],
    loads: Mapping[str, ReplicaLoad],
    num_picked: Mapping[str, int],
    draw: Callable[[], float],
) -> list[str] | None:
    """Replicas in the order in which to try them, or None for "no opinion".

    ``num_picked``: requests sent to a replica that its published load cannot show yet. ``draw`` breaks ties.
    """
    known = [replica_id for replica_id in replica_ids if replica_id in loads]
    if not known:
        return None
    scored = [(score(loads[replica_id], num_picked.get(replica_id, 0)), draw(), replica_id) for replica_id in known]
    unknown = [replica_id for replica_id in replica_ids if replica_id not in loads]
    return [replica_id for _, _, replica_id in sorted(scored, reverse=True)] + unknown


def score(load: ReplicaLoad, num_picked: int) -> float:
    """1 for an idle replica, towards 0 with load; strictly falling in requests held, so equal replicas share evenly."""
    held = load.num_running + load.num_waiting + num_picked
    slots = 1 / (1 + held / load.max_num_seqs)
    prefill = 1 / (1 + load.queued_prefill_tokens / load.max_num_batched_tokens)
    room = 1 - min(max(load.kv_used_frac, 0.0), 1.0)
    return WEIGHT_SLOTS * slots + WEIGHT_PREFILL * prefill + WEIGHT_KV * room
