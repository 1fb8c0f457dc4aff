"""A tiny model for whoever needs one."""

from __future__ import annotations

import pytest

from tests.models import write_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("models") / "tiny"))
