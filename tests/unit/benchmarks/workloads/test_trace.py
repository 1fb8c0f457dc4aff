"""Recorded traces are read row by row; what cannot be read is named."""

import pytest

from benchmarks.workloads.trace import read_rows


def test_rows_are_read_in_order(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("input_tokens,arrival_s,output_tokens\n10,0.5,3\n3000,12.5,0\n")
    assert read_rows(path) == [(0.5, 10, 3), (12.5, 3000, 0)]


def test_a_missing_column_and_a_bad_row_are_named(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,input_tokens\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns output_tokens"):
        read_rows(path)
    path.write_text("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n")
    with pytest.raises(ValueError, match="line 3"):
        read_rows(path)
