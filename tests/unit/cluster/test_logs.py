from __future__ import annotations

import json
import logging

from cluster.logs import JsonFormatter, TextFormatter, fields


def record(**values: object) -> logging.LogRecord:
    logger = logging.getLogger("cluster.test")
    return logger.makeRecord(logger.name, logging.INFO, "f", 1, "request", (), None, extra=fields(values))


def test_a_json_line_holds_the_fields_beside_message_level_and_time() -> None:
    line = json.loads(JsonFormatter().format(record(request_id="a\nb", status=200, ttft_ms=None)))
    assert line["time"].endswith("+00:00")
    del line["time"]
    assert line == {
        "level": "INFO",
        "logger": "cluster.test",
        "message": "request",
        "request_id": "a\nb",
        "status": 200,
    }
    assert "\n" not in JsonFormatter().format(record(request_id="a\nb"))


def test_an_exception_is_in_the_json_line() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        failed = record()
        failed.exc_info = (type(error), error, error.__traceback__)
    assert "ValueError: boom" in json.loads(JsonFormatter().format(failed))["exception"]


def test_a_text_line_ends_with_the_fields() -> None:
    assert (
        TextFormatter().format(record(status=200, outcome="ok")).endswith("cluster.test: request status=200 outcome=ok")
    )
