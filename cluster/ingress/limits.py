"""What the ingress refuses before looking at it: too many bytes, too many requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.ingress.errors import DEFAULT_RETRY_AFTER_S, ApiError, Outcome


class BodyLimit:
    """Counts a body's bytes as they arrive, so that an endless one is refused at its limit."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def check_declared(self, content_length: str | None) -> None:
        """Refuse by the Content-Length header, before reading. Raises ApiError."""
        if content_length is not None and content_length.isdigit() and int(content_length) > self._max_bytes:
            raise self._too_large()

    def check_received(self, num_bytes: int) -> None:
        """Raises ApiError."""
        if num_bytes > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(Outcome.TOO_LARGE, f"the request body is larger than {self._max_bytes} bytes")


def check_headers(headers: Sequence[tuple[bytes, bytes]], max_bytes: int) -> None:
    """Raises ApiError; a proxy in front usually allows less anyway."""
    if sum(len(name) + len(value) for name, value in headers) > max_bytes:
        raise ApiError(Outcome.HEADERS_TOO_LARGE, f"the request's headers are larger than {max_bytes} bytes")


class ConcurrencyLimit:
    """Bounds the requests that one ingress replica holds at a time."""

    def __init__(self, max_concurrent: int) -> None:
        self._max_concurrent = max_concurrent
        self.num_held = 0

    def acquire(self) -> None:
        """Raises ApiError (busy) when the ingress is full; else `release` must follow."""
        if self.num_held >= self._max_concurrent:
            raise ApiError(
                Outcome.BUSY,
                f"this ingress already serves {self._max_concurrent} requests",
                retry_after_s=DEFAULT_RETRY_AFTER_S,
            )
        self.num_held += 1

    def release(self) -> None:
        self.num_held -= 1
