"""Progress of work that takes seconds to minutes: a bar where somebody watches, log lines where nobody does."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 5.0
GIB = 1 << 30


@contextmanager
def byte_progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes of each finished piece, from any thread.

    On a terminal a rich bar on stderr that goes away at the end; otherwise a log line every LOG_PERIOD_S. Either way
    the log tells at the end how long it took.
    """
    started_s = time.perf_counter()
    with _bar(title, total_bytes) if sys.stderr.isatty() else _log_lines(title, total_bytes) as advance:
        yield advance
    took_s = time.perf_counter() - started_s
    rate = total_bytes / GIB / took_s if took_s else 0.0
    logger.info("%s: %.2f GiB in %.1f s (%.1f GiB/s)", title, total_bytes / GIB, took_s, rate)


@contextmanager
def _bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    speed = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *speed, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


@contextmanager
def _log_lines(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    lock = threading.Lock()
    done_bytes, next_s = 0, time.monotonic() + LOG_PERIOD_S

    def advance(num_bytes: int) -> None:
        nonlocal done_bytes, next_s
        with lock:
            done_bytes += num_bytes
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + LOG_PERIOD_S
                logger.info("%s: %.1f of %.1f GiB", title, done_bytes / GIB, total_bytes / GIB)

    yield advance
