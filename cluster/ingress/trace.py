"""Who a request is: its id, and the W3C trace context that it belongs to. Pure.

The id is the client's ``x-request-id`` or a new one. A valid ``traceparent`` is continued: same trace, a span of our
own; without one a new trace begins, so that log lines of ingress and engine can always be joined.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

REQUEST_ID_HEADER = "x-request-id"
TRACEPARENT_HEADER = "traceparent"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# https://www.w3.org/TR/trace-context/#traceparent-header-field-values; later versions may append fields
TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<rest>-.*)?"
)


@dataclass(frozen=True, slots=True)
class TraceContext:
    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16, this request's in the ingress
    flags: str = "00"

    @property
    def traceparent(self) -> str:
        """What is passed on: the engine's spans are children of this one."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def take_request_id(headers: Mapping[str, str]) -> str:
    """The client's id, or the one that Serve gave it, if it is a sensible one; else a new one.

    Serve sends the header back with the response.
    """
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def take_trace(headers: Mapping[str, str]) -> TraceContext:
    """The client's trace, or a new one if it sent none that is valid."""
    span_id = secrets.token_hex(8)
    match = TRACEPARENT.fullmatch(headers.get(TRACEPARENT_HEADER, "").strip())
    if match and _is_valid(match):
        return TraceContext(match["trace"], span_id, match["flags"])
    return TraceContext(secrets.token_hex(16), span_id)


def _is_valid(match: re.Match[str]) -> bool:
    if match["version"] == "ff" or (match["version"] == "00" and match["rest"]):
        return False
    return bool(match["trace"].strip("0") and match["parent"].strip("0"))
