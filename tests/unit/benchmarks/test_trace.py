"""Trace replay: the right rows, moved to zero, sped up and cut."""

import pytest

from benchmarks.workloads.trace import load_trace

TRACE = """arrival_s,input_tokens,output_tokens
0.5,10,3
10.0,20,4
12.5,3000,0
19.999,7,900
20.0,5,5
"""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_a_window_starts_at_zero_and_excludes_its_end(trace):
    workload = load_trace(trace, vocab_size=100, seed=0, start_s=10, end_s=20)
    assert [a.at_s for a in workload.arrivals] == pytest.approx([0.0, 2.5, 9.999])
    assert [len(a.prompt_ids) for a in workload.arrivals] == [20, 3000, 7]
    assert [a.max_tokens for a in workload.arrivals] == [4, 1, 900]  # a request asks for one token at least
    assert workload.duration_s == 10


def test_speed_and_limits(trace):
    workload = load_trace(
        trace, vocab_size=100, seed=0, start_s=10, end_s=20, speed=4, max_input_tokens=64, max_output_tokens=32
    )
    assert [a.at_s for a in workload.arrivals] == pytest.approx([0.0, 0.625, 9.999 / 4])
    assert [len(a.prompt_ids) for a in workload.arrivals] == [20, 64, 7]
    assert [a.max_tokens for a in workload.arrivals] == [4, 1, 32]
    assert workload.duration_s == 2.5


def test_the_whole_trace_lasts_until_its_last_arrival(trace):
    workload = load_trace(trace, vocab_size=100, seed=0)
    assert len(workload.arrivals) == 5
    assert workload.duration_s == 20.0


def test_a_missing_column_and_a_bad_row_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,input_tokens\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns output_tokens"):
        load_trace(path, vocab_size=10, seed=0)
    path.write_text("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n")
    with pytest.raises(ValueError, match="line 3"):
        load_trace(path, vocab_size=10, seed=0)
