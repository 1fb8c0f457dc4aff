"""A local cluster's folder: a short path for Ray's sockets, and no trace of it once its owner has ended, however.

The owner holds a lock on a file in it, which the kernel lets go when the owner dies; the next cluster then removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from cluster.local.processes import marked_pids

# Not below TMPDIR, which may be long: Ray puts sockets there, and their paths hold 107 bytes.
PARENT = Path("/tmp")
PREFIX = "bs-"
LOCK = "owner.lock"


class Scratch:
    """Made by `create`, ended by `remove`. The folder's name is the mark of the cluster's processes."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> Scratch:
        """A new folder; those that dead owners left behind are removed first."""
        remove_stale()
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=PARENT))
        lock = os.open(path / f"{LOCK}.new", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(path / f"{LOCK}.new", path / LOCK)  # others find it locked only, or the folder looked ownerless
        return cls(path, lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_stale() -> None:
    """Remove the folders of this user whose owner is dead and whose processes have ended."""
    for path in PARENT.glob(f"{PREFIX}*"):
        try:
            if path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR)
        except OSError:  # being made or removed at this moment, or not ours
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not marked_pids(path.name):
                shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:  # its owner lives
            continue
        finally:
            os.close(lock)
