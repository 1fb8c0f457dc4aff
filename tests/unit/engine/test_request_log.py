"""The request log: bounded, and an API request is found with all its choices and attempts, and no other."""

from __future__ import annotations

from engine.request_log import RequestLog, RequestRecord


def record(request_id: str, ended_at_s: float = 0.0) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        service_class="standard",
        finish_reason="stop",
        ended_at_s=ended_at_s,
        duration_s=1.0,
        queue_wait_s=0.1,
        ttft_s=0.2,
        tpot_s=None,
        prompt_tokens=4,
        cached_tokens=0,
        completion_tokens=1,
        routed_pairs=8,
        dimmed_pairs=2,
        level_mean=0.5,
        level_peak=1,
        first_setting_version=3,
        last_setting_version=4,
    )


def test_all_of_a_request_and_nothing_else() -> None:
    log = RequestLog()
    for request_id in ("a-0f-0", "a-0f-1", "a-0f-1-retry", "ab-0f", "b-a"):
        log.append(record(request_id))
    assert [r.request_id for r in log.find("a")] == ["a-0f-0", "a-0f-1", "a-0f-1-retry"]
    assert [r.request_id for r in log.find("a-0f-1")] == ["a-0f-1", "a-0f-1-retry"]
    assert log.find("f") == []


def test_by_time_newest_first_and_bounded() -> None:
    log = RequestLog(capacity=5)
    for number in range(9):
        log.append(record(str(number), ended_at_s=float(number)))
    assert [r.request_id for r in log.between(0.0, 8.0, limit=3)] == ["7", "6", "5"]
    assert len(log.between(0.0, 99.0, limit=99)) == 5
