"""Configuration that cannot work is refused in one sentence that names key, value and allowed values."""

from __future__ import annotations

from typing import Any

import pytest

from controller.config import ConfigError, ControllerConfig
from controller.types import Slo


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"law": "pid"}, "controller.law"),
        ({"law": "static", "level": -1}, "level"),
        ({"law": "aimd", "law_params": {"speed": 1.0}}, "speed"),
        ({"tick_s": 0}, "controller.tick_s"),
        ({"lease_s": 0.5}, "controller.lease_s"),
        ({"window_s": -1}, "controller.window_s"),
        ({"slo": Slo(0.0, 0.1)}, "controller.slo"),
        ({"slo": Slo(1.0, float("inf"))}, "controller.slo"),
        ({"slo_by_model": {"m": Slo(1.0, float("nan"))}}, "'m'"),
        ({"host": "0.0.0.0"}, "controller.host"),
        ({"host": "::"}, "controller.host"),
        ({"host": "8.8.8.8"}, "controller.host"),
        ({"host": "example.org"}, "controller.host"),
        ({"port": 70000}, "controller.port"),
        ({"key_prefix": "a{b}"}, "controller.key_prefix"),
    ],
)
def test_bad_values(fields: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match="allowed") as caught:
        ControllerConfig(**fields)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "10.1.2.3", "192.168.0.4", "172.16.9.9"])
def test_loopback_and_private_hosts_are_allowed(host: str) -> None:
    assert ControllerConfig(host=host).host == host


def test_slo_by_model_overrides_the_default() -> None:
    config = ControllerConfig(slo_by_model={"fast": Slo(0.2, 0.02)})
    assert config.slo_of("fast") == Slo(0.2, 0.02)
    assert config.slo_of("other") == config.slo
