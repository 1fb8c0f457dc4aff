"""Log lines with fields: plain text for people, or one JSON object a line for machines. Never a prompt's text.

A line's fields are given as ``logger.info("request", extra=fields({...}))``; both formats print them.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

FIELDS = "fields"  # the LogRecord's attribute
PACKAGES = ("cluster", "controller", "engine")


def fields(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """``extra`` of a logging call; None values are left out."""
    return {FIELDS: {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        pairs = [f"{name}={value}" for name, value in getattr(record, FIELDS, {}).items()]
        return " ".join([super().formatMessage(record), *pairs])


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(log_format: str) -> None:
    """Send this process' lines of our packages to its stderr, which Ray keeps as logs/worker-*.err, one line each.

    That is the file, not ``sys.stderr``: Serve's own goes through its logger, which drops lines below the
    ``log_level`` of the Serve file and puts its own text before the others.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
