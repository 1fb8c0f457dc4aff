"""The engine while it dims: consent, accounts, what cached KV may serve, settings and their leases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import BrownoutConfig
from engine.types import (
    BrownoutSetting,
    ServiceClass,
)
from tests.unit.engine.stepping import PROMPT, TOP_LEVEL, UNITED, Clock, make_engine, request, run, tokens


def test_a_pinned_level_dims_all_but_full_class_requests(model: str) -> None:
    exact = tokens(run(make_engine(model, brownout=UNITED), request("exact"))["exact"])
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    others = [request(f"other{i}", prompt=tuple(range(i * 50, i * 50 + 40))) for i in range(3)]
    outputs = run(engine, request("full", service_class=ServiceClass.FULL), *others)
    assert tokens(outputs["full"]) == exact
    usages = {request_id: parts[-1].usage for request_id, parts in outputs.items()}
    full, other = usages["full"], usages["other0"]
    assert full is not None
    assert other is not None
    assert (full.brownout.dimmed_pairs, full.brownout.level_peak) == (0, 0)
    assert other.brownout.dimmed_pairs > 0
    assert (other.brownout.level_peak, other.brownout.level_mean) == (TOP_LEVEL, TOP_LEVEL)
    total = sum(u.brownout.dimmed_pairs for u in usages.values() if u is not None)
    assert engine.recorder.totals().dimmed_pairs == total
    (rise,) = engine.level_log.between(0.0, float("inf"))
    assert (rise.level_before, rise.level, rise.num_running + rise.num_waiting) == (0, TOP_LEVEL, 4)


def test_what_was_lost_is_booked_by_class_and_told_in_the_log(model: str, tmp_path: Path) -> None:
    ladder = tmp_path / "ladder.json"
    levels = [{"way": 1, "share": 0.0, "loss": 0.0}, {"way": 2, "share": 1.0, "loss": 0.25}]
    ladder.write_text(json.dumps({"levels": levels}))
    engine = make_engine(model, brownout=replace(UNITED, ladder=str(ladder), allow_unmeasured=False))
    engine.apply_setting(replace(BrownoutSetting.pinned(1), epoch=1, version=7))
    run(engine, request("dimmed"), request("full", service_class=ServiceClass.FULL))
    window = engine.recorder.drain(engine.stats(), 1.0)
    standard, full = window.classes[ServiceClass.STANDARD], window.classes[ServiceClass.FULL]
    assert standard.num_tokens == full.num_tokens == len(PROMPT) + 7
    assert standard.loss_nats == pytest.approx(0.25 * standard.num_tokens)
    assert full.loss_nats == 0.0
    (record,) = engine.request_log.find("dimmed")
    assert (record.level_mean, record.level_peak, record.completion_tokens) == (1.0, 1, 8)
    assert (record.first_setting_version, record.last_setting_version) == (7, 7)
    assert (record.finish_reason, record.service_class) == ("length", "standard")


def test_every_pair_is_counted_on_its_expert(model: str) -> None:
    engine = make_engine(model)
    run(engine, request())
    slot = engine.leave()
    assert slot.counter is not None
    slot.counter.take()
    experts = slot.counter.take()
    assert experts is not None and experts.layer == (0, 1, 2)
    pairs_per_layer = engine.stats().num_tokens * slot.spec.num_experts_per_token
    assert slot.counter._total[:, :-1].sum(dim=1).tolist() == [pairs_per_layer] * 3
    assert all(4 <= num_active <= 12 for num_active in experts.active_experts)


def test_a_dimmed_prefix_is_never_reused_by_a_full_class_request(model: str) -> None:
    exact = tokens(run(make_engine(model, brownout=UNITED), request("exact"))["exact"])
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    run(engine, request("dimmed"))
    outputs = run(engine, request("again"), request("full", service_class=ServiceClass.FULL))
    again, full = outputs["again"][-1].usage, outputs["full"][-1].usage
    assert again is not None
    assert full is not None
    assert again.cached_tokens == 32
    assert full.cached_tokens == 0
    assert tokens(outputs["full"]) == exact


def test_usage_tells_what_reused_kv_was_computed_at(model: str) -> None:
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    run(engine, request("dimmed"))
    engine.apply_setting(BrownoutSetting.pinned(0))
    usage = run(engine, request("again"))["again"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 32
    assert (usage.brownout.dimmed_pairs, usage.brownout.level_mean) == (0, 0)
    assert usage.brownout.level_peak == TOP_LEVEL


def test_usages_add_up_to_the_engines_counters(model: str) -> None:
    engine = make_engine(model, brownout=UNITED)
    engine.apply_setting(BrownoutSetting.pinned(1))
    classes = (ServiceClass.STANDARD, ServiceClass.FULL, ServiceClass.STANDARD)
    outputs = run(engine, *(request(f"r{i}", service_class=c) for i, c in enumerate(classes)))
    usages = [stream[-1].usage for stream in outputs.values()]
    totals = engine.recorder.totals()
    assert sum(u.brownout.dimmed_pairs for u in usages if u is not None) == totals.dimmed_pairs > 0
    assert sum(u.brownout.routed_pairs for u in usages if u is not None) == totals.routed_pairs
    assert engine.recorder.drain(engine.stats(), 1.0).dimmed_pairs == totals.dimmed_pairs


def test_an_unmeasured_ladder_is_not_climbed_unless_allowed_by_name(model: str) -> None:
    unmeasured = BrownoutConfig(ways=(2, 4), exempt_first=0, exempt_last=0, profile_repeats=0)
    engine = make_engine(model, brownout=unmeasured)
    engine.apply_setting(BrownoutSetting.pinned(TOP_LEVEL))
    usage = run(engine, request())["a"][-1].usage
    assert usage is not None
    assert usage.brownout.dimmed_pairs == 0


def test_settings_are_ordered_and_leased(model: str) -> None:
    clock = Clock()
    engine = make_engine(model, clock, brownout=UNITED)
    pinned = BrownoutSetting.pinned(TOP_LEVEL)
    newer = BrownoutSetting(pinned.prefill, pinned.decode, epoch=2, version=7, lease_s=2.0)
    older = BrownoutSetting(pinned.prefill, pinned.decode, epoch=1, version=9)
    assert engine.apply_setting(newer)
    assert not engine.apply_setting(older)
    usage = run(engine, request())["a"][-1].usage
    assert usage is not None
    assert (usage.brownout.level_peak, usage.brownout.setting_version) == (TOP_LEVEL, 7)
    clock.now_s += 2.5
    assert engine.stats().lease_expired
    usage = run(engine, request("b"))["b"][-1].usage
    assert usage is not None
    assert usage.brownout.dimmed_pairs == 0  # the SLO needs no dimming here, so the safe policy does none
    assert engine.apply_setting(newer)  # a renewal
    assert not engine.stats().lease_expired
