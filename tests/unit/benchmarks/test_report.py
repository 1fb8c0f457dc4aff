"""Report figures against cases computed by hand."""

import math

import pytest

from benchmarks.loadgen.record import Outcome, RequestRecord
from benchmarks.report import Slo, by_second, measure, nearest_rank, percentile
from engine.types import BrownoutUsage

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def completed(at_s, ttft_s, tpot_s, num_tokens=11, brownout=None, sent_late_s=0.0):
    first_token_s = at_s + ttft_s
    return RequestRecord(
        scheduled_s=at_s,
        sent_s=at_s + sent_late_s,
        outcome=Outcome.COMPLETED,
        first_token_s=first_token_s,
        last_token_s=first_token_s + tpot_s * (num_tokens - 1),
        num_prompt_tokens=9,
        num_tokens=num_tokens,
        brownout=brownout,
    )


def failed(at_s, outcome=Outcome.STREAM_ERROR):
    return RequestRecord(scheduled_s=at_s, sent_s=at_s, outcome=outcome, first_token_s=at_s + 0.1)


def test_nearest_rank_is_one_of_the_values():
    values = [float(v) for v in range(1, 11)]
    assert [nearest_rank(values, p) for p in (1, 10, 11, 50, 90, 91, 99, 100)] == [1, 1, 2, 5, 9, 10, 10, 10]
    assert nearest_rank([3.0], 50) == 3.0
    assert percentile([], 90) is None


def test_attainment_needs_both_objectives_and_counts_failures():
    records = [
        completed(0.0, 0.5, 0.05),
        completed(1.0, 1.0, 0.05),  # exactly met
        completed(2.0, 1.1, 0.05),  # TTFT missed
        completed(3.0, 0.5, 0.2),  # TPOT missed
        failed(4.0),
    ]
    metrics = measure(records, SLO, offered_s=10)
    assert metrics.slo_attainment == pytest.approx(2 / 5)
    assert (metrics.requests, metrics.failed) == (5, 1)
    assert metrics.outcomes == {"completed": 4, "stream_error": 1}
    assert metrics.violation_s == 3
    assert metrics.goodput_tok_s == pytest.approx(22 / 10)
    assert metrics.tok_s == pytest.approx(44 / 10)
    assert metrics.ttft_p50_s == pytest.approx(0.5)
    assert metrics.ttft_p99_s == pytest.approx(1.1)


def test_a_second_is_violated_by_its_slow_tenth_only():
    one_slow_of_ten = [completed(0.05 * i, 2.0 if i == 0 else 0.5, 0.05) for i in range(10)]
    two_slow_of_ten = [completed(3 + 0.05 * i, 2.0 if i < 2 else 0.5, 0.05) for i in range(10)]
    assert measure(one_slow_of_ten, SLO, 10).violation_s == 0
    assert measure(one_slow_of_ten + two_slow_of_ten, SLO, 10).violation_s == 1


def test_seconds_belong_to_the_arrival_not_to_the_answer():
    seconds = by_second([completed(0.9, 5.0, 0.05), completed(2.0, 0.2, 0.05)])
    assert [(s.second, s.num_arrivals) for s in seconds] == [(0, 1), (2, 1)]
    assert seconds[0].ttft_p90_s == pytest.approx(5.0)


def test_a_failed_request_is_infinitely_slow_though_it_had_a_token():
    (second,) = by_second([failed(0.0)])
    assert math.isinf(second.ttft_p90_s) and second.violates(SLO)


def test_a_single_token_has_no_tpot_and_meets_it():
    metrics = measure([completed(0.0, 0.5, 0.0, num_tokens=1)], SLO, 1)
    assert metrics.slo_attainment == 1.0
    assert metrics.tpot_p50_s is None


def test_latency_counts_from_the_schedule_and_the_late_send_is_reported():
    metrics = measure([completed(0.0, 0.5, 0.05, sent_late_s=0.4)], SLO, 1)
    assert metrics.ttft_p50_s == pytest.approx(0.5)
    assert metrics.send_delay_max_s == pytest.approx(0.4)


def test_rates_cover_the_time_until_the_last_token():
    metrics = measure([completed(0.0, 19.0, 0.1)], SLO, offered_s=5)
    assert metrics.duration_s == pytest.approx(20.0)
    assert metrics.tok_s == pytest.approx(11 / 20)
    assert metrics.goodput_tok_s == 0


def test_levels_weigh_by_tokens_and_pairs():
    light = BrownoutUsage(routed_pairs=100, dimmed_pairs=0, level_peak=0, level_mean=0.0)
    heavy = BrownoutUsage(routed_pairs=300, dimmed_pairs=120, level_peak=5, level_mean=4.0)
    metrics = measure(
        [
            completed(0.0, 0.5, 0.05, num_tokens=11, brownout=light),  # 9 + 11 = 20 tokens
            completed(0.0, 0.5, 0.05, num_tokens=51, brownout=heavy),  # 9 + 51 = 60 tokens
        ],
        SLO,
        10,
    )
    assert metrics.level_mean == pytest.approx(3.0)
    assert metrics.level_peak == 5
    assert metrics.dimmed_share == pytest.approx(0.3)


def test_nothing_measured_is_not_zero_latency():
    metrics = measure([failed(0.0, Outcome.TIMEOUT)], SLO, 10)
    assert metrics.ttft_p90_s is None and metrics.tpot_p90_s is None
    assert (metrics.slo_attainment, metrics.violation_s, metrics.failed) == (0.0, 1, 1)
