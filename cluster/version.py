"""The release that runs, as the CLI and the API tell it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def _installed() -> str:
    try:
        return version("brownoutserve")
    except PackageNotFoundError:
        return "not installed"


VERSION = _installed()
