"""Processes of a local cluster: started so that they end with us, found again by a mark, ended to the last one.

Every process of a cluster inherits an environment variable with the cluster's own value. That finds workers, proxies
and their children wherever Ray has put them, and never a process of another cluster.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

MARK = "BROWNOUTSERVE_CLUSTER"
QUIET_S = 0.6  # without a marked process in sight, a cluster counts as ended
# Between those of Ray's workers (10002 to 19999) and those that the kernel hands out by itself (from 32768): a port
# that has been found free is not taken by chance before it is used.
SINGLE_PORTS = range(20_000, 26_000)
PORT_RANGES = range(26_000, 32_000)

# Asks the kernel for SIGTERM when the parent's thread ends, then becomes the command. A short interpreter start instead
# of a preexec_fn, because Python code between fork and exec may deadlock in a parent that runs gRPC or Ray threads.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def spawn(command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own (Ctrl-C is ours alone), output to ``log``, ended with this thread."""
    launcher = [sys.executable, "-ISc", _END_WITH_PARENT, str(os.getpid()), *command]
    with open(log, "wb") as output:
        return subprocess.Popen(
            launcher,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def marked_pids(value: str, name: str = MARK) -> list[int]:
    """Processes whose environment says ``name=value``."""
    entry = f"{name}={value}".encode()
    pids = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            environment = (directory / "environ").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if entry in environment.split(b"\0"):
            pids.append(int(directory.name))
    return pids


def end_marked(value: str, grace_s: float) -> None:
    """SIGTERM to all marked processes and their descendants, SIGKILL to those that are there after ``grace_s``."""
    family = _Family(value)
    _signal_all(family.members(), signal.SIGTERM)
    deadline_s = time.monotonic() + grace_s
    while family.members() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    # Ray replaces agents that end before it does, and a process that is just being started shows no environment until
    # it has been scheduled, which takes a while on a busy machine.
    quiet_since_s = time.monotonic()
    while time.monotonic() - quiet_since_s < QUIET_S:
        if pids := family.members():
            _signal_all(pids, signal.SIGKILL)
            quiet_since_s = time.monotonic()
        time.sleep(0.02)


class _Family:
    """Marked processes and all that descend from them: Ray's agents write their title over their environment."""

    def __init__(self, value: str) -> None:
        self._value = value
        self._started: dict[int, str] = {}  # pid |-> start time, which tells a process from a later one of its pid

    def members(self) -> list[int]:
        """Those alive now, with whatever has joined since the last call."""
        parent_of: dict[int, int] = {}
        started: dict[int, str] = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, *rest = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone
                continue
            if state != "Z":
                parent_of[int(directory.name)], started[int(directory.name)] = int(parent), rest[17]
        found = {pid for pid, start in self._started.items() if started.get(pid) == start}
        found.update(pid for pid in marked_pids(self._value) if pid in started)
        joined = found
        while joined:
            joined = {pid for pid, parent in parent_of.items() if parent in joined and pid not in found}
            found |= joined
        self._started = {pid: started[pid] for pid in found}
        return sorted(found)


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def process_age_s() -> float:
    """How long ago this process was started."""
    started_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def claim(name: str) -> socket.socket | None:
    """Make ``name`` this process's until the socket is closed or the process ends; None if another one has it."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0{name}")
    except OSError:
        holder.close()
        return None
    return holder


def free_port_range(width: int, host: str = "127.0.0.1") -> int:
    """First of ``width`` ports in a row that are free now."""
    for start in _shuffled(PORT_RANGES[::width]):
        if all(is_port_free(port, host) for port in range(start, start + width)):
            return start
    raise OSError(f"no {width} ports in a row are free on {host}")


def free_ports(count: int, host: str = "127.0.0.1", spared: int | None = None) -> list[int]:
    """``count`` different ports that are free now, without the one that somebody else is to have."""
    found = (port for port in _shuffled(SINGLE_PORTS) if port != spared and is_port_free(port, host))
    ports = list(islice(found, count))
    if len(ports) < count:
        raise OSError(f"no {count} ports are free on {host}")
    return ports


def _shuffled(ports: range) -> list[int]:
    """So that two clusters that start together choose differently, whatever seed this process has set."""
    return random.SystemRandom().sample(ports, len(ports))
