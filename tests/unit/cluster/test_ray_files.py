"""The files for `ray up` are what Ray's launcher accepts; nothing is launched."""

from __future__ import annotations

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.models import PROJECT_ROOT

FILES = sorted((PROJECT_ROOT / "deploy/ray").glob("*.yaml"))


@pytest.mark.parametrize("name", [path.name for path in FILES])
def test_the_launcher_accepts_it(name: str) -> None:
    document = yaml.safe_load((PROJECT_ROOT / "deploy/ray" / name).read_text())
    validate_config(prepare_config(document))


def test_every_node_gets_the_same_environment() -> None:
    for path in FILES:
        document = yaml.safe_load(path.read_text())
        for command in document["head_start_ray_commands"] + document["worker_start_ray_commands"]:
            assert ". deploy/ray/environment.sh" in command
