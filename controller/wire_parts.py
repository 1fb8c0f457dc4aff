"""The parts of messages that there are many of, read and checked with little work for each value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import lt

from controller.reports import ExpertLoad, ShapeWindow
from controller.sketch import RELATIVE_ERROR, QuantileSketch
from protos import telemetry_pb2

MAX_ID_LENGTH = 256
MAX_LAYERS = 1024
MAX_HOT = 64
MAX_LOG2_TOKENS = 40
MAX_BUCKETS = 4096  # at 1 % resolution they span 35 decimal orders

_EMPTY_SKETCH = QuantileSketch()


class WireError(ValueError):
    """A message that cannot be true, in one sentence."""


def read_sketch(name: str, message: telemetry_pb2.QuantileSketch) -> QuantileSketch:
    """WireError names the part that cannot be true."""
    buckets, counts, zero_count = tuple(message.bucket), tuple(message.count), message.zero_count
    if not buckets and not counts and not zero_count:
        return _EMPTY_SKETCH  # an absent sketch has resolution 0 on the wire
    if message.relative_error != RELATIVE_ERROR:
        raise WireError(f"{name}.relative_error {message.relative_error} cannot be true")
    if not len(buckets) == len(counts) <= MAX_BUCKETS:
        raise WireError(f"len({name}.count) {len(counts)} cannot be true with {len(buckets)} buckets")
    if not all(map(lt, buckets, buckets[1:])):
        raise WireError(f"{name}.bucket is not ascending")
    if buckets and not (buckets[0] >= -MAX_BUCKETS and buckets[-1] <= MAX_BUCKETS):
        raise WireError(f"{name}.bucket is beyond the range")
    if not 0 <= message.sum < math.inf:
        raise WireError(f"{name}.sum {message.sum} cannot be true")
    return QuantileSketch(RELATIVE_ERROR, dict(zip(buckets, counts, strict=True)), zero_count, message.sum)


def read_shapes(messages: Iterable[telemetry_pb2.ShapeWindow]) -> dict[int, ShapeWindow]:
    """log2 of the step's tokens |-> its steps."""
    shapes: dict[int, ShapeWindow] = {}
    for message in messages:
        log2_tokens, step_time_s = message.log2_tokens, message.step_time_s
        if log2_tokens > MAX_LOG2_TOKENS:
            raise WireError(f"log2_tokens {log2_tokens} cannot be true")
        shapes[log2_tokens] = ShapeWindow(message.num_steps, duration("shapes.step_time_s", step_time_s))
    return shapes


def read_experts(message: telemetry_pb2.ExpertLoad) -> ExpertLoad:
    """Columns of equal length, with finite numbers in them."""
    layers, hot, num_hot = tuple(message.layer), tuple(message.hot_expert), message.num_hot
    active, balance = durations("active_experts", message.active_experts), _fractions("balance", message.balance_index)
    shares = _fractions("hot_share", message.hot_share)
    require(len(layers) <= MAX_LAYERS and num_hot <= MAX_HOT, "len(experts.layer)", len(layers))
    require(len(active) == len(balance) == len(layers), "len(active_experts)", len(active))
    require(len(hot) == len(shares) == num_hot * len(layers), "len(hot_share)", len(shares))
    return ExpertLoad(layers, active, balance, num_hot, hot, shares)


def identifier(name: str, value: str) -> str:
    require(0 < len(value) <= MAX_ID_LENGTH and value.isprintable(), name, value[:MAX_ID_LENGTH])
    return value


def duration(name: str, value: float) -> float:
    require(0 <= value < math.inf, name, value)
    return value


def durations(name: str, values: Iterable[float]) -> tuple[float, ...]:
    read = tuple(values)
    require(all(map(math.isfinite, read)) and min(read, default=0.0) >= 0, name, read)
    return read


def finite(name: str, value: float) -> float:
    require(math.isfinite(value), name, value)
    return value


def require(holds: bool, name: str, value: object) -> None:
    if not holds:
        raise WireError(f"{name} {value!r} cannot be true")


def _fractions(name: str, values: Iterable[float]) -> tuple[float, ...]:
    read = durations(name, values)
    require(max(read, default=0.0) <= 1 + 1e-6, name, read)
    return read
