import argparse
from pathlib import Path

import pytest

from benchmarks.results import result_file


def test_a_folder_is_refused_as_a_result_file(tmp_path: Path) -> None:
    assert result_file(str(tmp_path / "new.json")) == tmp_path / "new.json"
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        result_file(str(tmp_path))
