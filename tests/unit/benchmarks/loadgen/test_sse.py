"""The event stream parser gives the same events wherever the stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loadgen.sse import SseParser

STREAM = (
    b": a comment\r\n"
    b"data: one\r\n\r\n"
    b"event: message\nid: 7\ndata:two\n\n"
    b"data: three\rdata:  more\r\r"
    b"retry: 5\n\n"  # no data: no event
    b"data\n\n"  # a field without a colon has an empty value
    b"data: [DONE]\r\n\r\n"
)
EVENTS = [b"one", b"two", b"three\n more", b"", b"[DONE]"]


def parse(chunks):
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_whole_stream():
    assert parse([STREAM]) == EVENTS


def test_byte_by_byte():
    assert parse([STREAM[i : i + 1] for i in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_any_cut(cuts):
    bounds = [0, *sorted(cuts), len(STREAM)]
    assert parse([STREAM[a:b] for a, b in pairwise(bounds)]) == EVENTS


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_unfinished_event_is_dropped(end):
    assert parse([b"data: whole\n\ndata: half" + end]) == [b"whole"]
