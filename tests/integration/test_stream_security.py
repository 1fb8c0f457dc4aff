"""TLS and the shared token of the control streams, with certificates made here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from controller.config import ConfigError, StreamSecurity
from engine.agent import ControlCredentials
from tests.certificates import Authority, certificate
from tests.integration.control_harness import CONFIG, Cluster
from tests.waiting import until_async

SERVER_NAME = "brownoutserve-controller"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return certificate("test authority")


@pytest.fixture
def security(authority: Authority, tmp_path: Path) -> StreamSecurity:
    server = certificate(SERVER_NAME, authority)
    files = {"cert": server.pem, "key": server.key_pem, "ca": authority.pem, "token": b"open sesame\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cert, key, ca, token = (str(tmp_path / name) for name in files)
    return StreamSecurity(cert, key, ca, SERVER_NAME, token)


async def test_with_certificate_and_token(cluster: Cluster, security: StreamSecurity, authority: Authority) -> None:
    await cluster.start_controller(replace(CONFIG, security=security))
    credentials = ControlCredentials(authority.pem, "open sesame", SERVER_NAME)
    a = await cluster.start_replica("a", credentials=credentials)
    await until_async(lambda: a.levels == (1, 1))


WRONG: dict[str, Callable[[Authority], ControlCredentials]] = {
    "no TLS": lambda _: ControlCredentials(token="open sesame"),
    "another authority": lambda _: ControlCredentials(certificate("other").pem, "open sesame", SERVER_NAME),
    "another name": lambda authority: ControlCredentials(authority.pem, "open sesame"),
    "no token": lambda authority: ControlCredentials(authority.pem, "", SERVER_NAME),
    "wrong token": lambda authority: ControlCredentials(authority.pem, "sesame", SERVER_NAME),
}


async def test_without_them_no_setting_is_had(cluster: Cluster, security: StreamSecurity, authority: Authority) -> None:
    service = await cluster.start_controller(replace(CONFIG, security=security))
    wrong = [await cluster.start_replica(name, credentials=make(authority)) for name, make in WRONG.items()]
    credentials = ControlCredentials(authority.pem, "open sesame", SERVER_NAME)
    right = await cluster.start_replica("right", credentials=credentials)
    await until_async(lambda: len(right.received) > 4)  # several times as long as a connection takes
    assert [replica.received for replica in wrong] == [[]] * len(WRONG)
    await until_async(lambda: list(service.status()["models"]["model"]["replicas"]) == ["right"])


async def test_without_either_the_log_says_who_can_reach_it(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="controller.security"):
        await cluster.start_controller()
    assert "without TLS and a token" in caplog.text and "loopback" in caplog.text


async def test_files_that_cannot_be_used(cluster: Cluster, security: StreamSecurity, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"controller\.security is .* allowed: all three or none"):
        replace(security, key_file="")
    with pytest.raises(OSError, match="missing"):
        await cluster.start_controller(
            replace(CONFIG, security=replace(security, token_file=str(tmp_path / "missing")))
        )
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="token_file"):
        await cluster.start_controller(replace(CONFIG, security=replace(security, token_file=str(tmp_path / "empty"))))
