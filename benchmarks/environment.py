"""Where a measurement was taken: machine, versions, command. Stands in every result file."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "transformers", "grpcio", "numpy", "triton")
LOAD_AVERAGE_AT_START = os.getloadavg()[0]  # of one minute: what else the machine was busy with


def describe() -> dict[str, Any]:
    """``machine``, ``versions`` and ``command`` of this process."""
    return {
        "machine": {
            "cpu": _cpu_name(),
            "load_average_at_start": LOAD_AVERAGE_AT_START,
            "num_cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_package_versions()},
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
    }


def _package_versions() -> dict[str, str]:
    """Versions of the packages that are installed here."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
