from __future__ import annotations

import pytest

from cluster.ingress.trace import take_request_id, take_trace

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "continued"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f" 00-{TRACE}-{PARENT}-00 ", True),
        (f"cc-{TRACE}-{PARENT}-01-what-comes-later", True),
        (f"00-{TRACE}-{PARENT}-01-extra", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE}-{PARENT}", False),
        ("nonsense", False),
        ("", False),
    ],
)
def test_a_valid_trace_is_continued_with_a_span_of_our_own(header: str, continued: bool) -> None:
    trace = take_trace({"traceparent": header})
    assert (trace.trace_id == TRACE) is continued
    assert trace.span_id != PARENT
    version, trace_id, span_id, flags = trace.traceparent.split("-")
    assert (version, trace_id, span_id) == ("00", trace.trace_id, trace.span_id)
    assert (len(trace_id), len(span_id), len(flags)) == (32, 16, 2)
    assert flags == (header.strip().split("-")[3] if continued else "00")


def test_request_ids() -> None:
    assert take_request_id({"x-request-id": "job-7:a"}) == "job-7:a"
    for bad in ("", "a b", "x" * 129, "ü"):
        assert take_request_id({"x-request-id": bad}) not in ("", bad)
    assert take_request_id({}) != take_request_id({})
