"""Finding and ending processes by their mark, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

from cluster.local.processes import (
    MARK,
    PORT_RANGES,
    SINGLE_PORTS,
    claim,
    end_marked,
    free_port_range,
    free_ports,
    is_port_free,
    marked_pids,
    spawn,
)
from tests.waiting import TIMEOUT_S, until

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
# A process that ignores SIGTERM and has a child in a session of its own, as Ray's workers may.
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)",
]


def test_every_marked_process_is_ended_and_no_other(tmp_path: Path) -> None:
    ours, others = uuid.uuid4().hex, uuid.uuid4().hex
    stranger = subprocess.Popen(SLEEP, env={**os.environ, MARK: others})
    process = spawn(STUBBORN, {**os.environ, MARK: ours}, tmp_path, tmp_path / "log")
    try:
        until(lambda: "ready" in (tmp_path / "log").read_text())
        until(lambda: len(marked_pids(ours)) == 2)  # one that has just begun shows its environment a little later
        end_marked(ours, grace_s=0.2)
        assert marked_pids(ours) == []
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_child_without_the_mark_is_ended_too(tmp_path: Path) -> None:
    mark, log = uuid.uuid4().hex, tmp_path / "log"
    parent = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = subprocess.Popen(sleep, env={}, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = spawn([sys.executable, "-c", parent], {**os.environ, MARK: mark}, tmp_path, log)
    until(lambda: log.read_text().endswith("\n"))
    child = Path("/proc", log.read_text().strip())
    assert is_running(child)
    end_marked(mark, grace_s=5.0)
    process.wait(TIMEOUT_S)
    assert not is_running(child)


def is_running(process: Path) -> bool:
    try:
        return "Z" not in (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone
        return False


def test_a_spawned_process_ends_with_its_parent(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    parent = (
        "import os, sys, pathlib; from cluster.local.processes import spawn\n"
        f"spawn({SLEEP!r}, dict(os.environ), pathlib.Path('.'), pathlib.Path({str(tmp_path / 'log')!r}))\n"
        "os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", parent], env={**os.environ, MARK: mark}, timeout=TIMEOUT_S)
    assert ended.returncode == -signal.SIGKILL
    until(lambda: not marked_pids(mark))


def test_ports() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(lowest, SINGLE_PORTS.stop), "the kernel hands out others"
    assert not set(SINGLE_PORTS) & set(PORT_RANGES)
    all_but_one = free_ports(len(SINGLE_PORTS) // 2, spared=ports[0])
    assert ports[0] not in all_but_one
    with socket.create_server(("127.0.0.1", 0)) as busy:
        assert not is_port_free(busy.getsockname()[1])
    start = free_port_range(10)
    assert all(is_port_free(port) for port in range(start, start + 10))


def test_a_name_is_one_process_at_a_time() -> None:
    name = f"test-{uuid.uuid4().hex}"
    first = claim(name)
    assert first is not None and claim(name) is None
    first.close()
    again = claim(name)
    assert again is not None
    again.close()
