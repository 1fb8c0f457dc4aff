"""Server-sent events out of a byte stream, whatever the boundaries at which it was cut on its way."""

from __future__ import annotations


class SseParser:
    """Incremental parser of the WHATWG event stream format; only the ``data`` field is kept.

    Lines end in LF, CRLF or CR; comments and other fields are skipped; an event cut off by the end is dropped.
    """

    def __init__(self) -> None:
        self._tail = b""  # of an unfinished line
        self._after_cr = False  # an LF that comes next belongs to the CR before it
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that ``chunk`` completes, in order."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if not chunk:
            return []
        self._after_cr = chunk.endswith(b"\r")
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._tail = (self._tail + chunk).split(b"\n")
        events = []
        for line in lines:
            if line:
                self._take(line)
            elif self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events

    def _take(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
