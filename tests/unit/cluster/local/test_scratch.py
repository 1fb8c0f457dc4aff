"""Folders of local clusters: removed when their owner has ended, however it did."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.local import scratch
from cluster.local.scratch import LOCK, PREFIX, Scratch


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scratch, "PARENT", tmp_path)
    return tmp_path


def test_a_dead_owners_folder_is_removed_by_the_next(parent: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from cluster.local import scratch
scratch.PARENT = Path({str(parent)!r})
scratch.Scratch.create()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    (left,) = parent.glob(f"{PREFIX}*")
    new = Scratch.create()
    assert not left.exists()
    assert new.path.exists()
    new.remove()
    assert not list(parent.iterdir())


def test_folders_in_use_and_of_others_stay(parent: Path) -> None:
    (parent / f"{PREFIX}foreign").mkdir()
    first, second = Scratch.create(), Scratch.create()
    assert first.path.exists() and (parent / f"{PREFIX}foreign").exists()
    first.remove()
    second.remove()


def test_a_folder_that_is_being_made_is_nobodys_to_remove(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cluster starts while this one has its folder, but not the lock yet."""
    lock = fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX:
            scratch.remove_stale()
        lock(descriptor, operation)

    monkeypatch.setattr(scratch.fcntl, "flock", lock_late)
    made = Scratch.create()
    assert (made.path / LOCK).exists()
    scratch.remove_stale()
    assert made.path.exists()
    made.remove()
