"""Real sockets that send too slowly, too much, or take nothing: none keeps a place in the ingress or the engine."""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.ingress.config import IngressSection
from tests.integration.served_api import CONTEXT_TOKENS, MODEL, ServedApi, engine_config, serve
from tests.models import write_config
from tests.waiting import until

LIMITS = IngressSection(
    max_concurrent=2,
    max_header_bytes=2048,
    max_body_bytes=4096,
    body_timeout_s=2.0,
    send_timeout_s=0.5,
)
SEND_BUFFER_BYTES = 4096
# About 2 kB an event and 8 events a step: more than all buffers on the way hold before long.
FLOOD = {"model": MODEL, "prompt": "Once", "n": 8, "max_tokens": 900, "ignore_eos": True, "logprobs": 20}
WHOLE = {"model": MODEL, "prompt": "Once", "max_tokens": 2}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.ingress.lingering.LINGER_S", 0.2)
        with serve(engine_config(path), LIMITS, send_buffer_bytes=SEND_BUFFER_BYTES) as api:
            yield api


def connect(api: ServedApi) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    client.connect((urlsplit(api.url).hostname, urlsplit(api.url).port))
    return client


def post(body: bytes, length: int | None = None, more: str = "") -> bytes:
    size = len(body) if length is None else length
    return f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n{more}\r\n".encode() + body


def answer(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Of a server that closes the connection when it has answered."""
    received = b""
    while chunk := client.recv(65536):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def is_answered(client: socket.socket) -> bool:
    return bool(select.select([client], [], [], 0)[0])


def test_slow_bodies_are_refused_and_give_their_places_back(api: ServedApi) -> None:
    def both_held_their_places() -> bool:
        """Whether the two were slow at the same time and as long as a third one asked, and not the machine too slow."""
        with closing(connect(api)) as silent, closing(connect(api)) as slow, closing(connect(api)) as third:
            for client in (silent, slow):
                client.sendall(post(b'{"model"', length=1000))
            until(lambda: api.service.concurrency.num_held == 2 or is_answered(silent) or is_answered(slow))
            third.sendall(post(json.dumps(WHOLE).encode(), more="connection: close\r\n"))
            refused = answer(third)[0] == 503
            with suppress(ConnectionError):
                while not is_answered(slow):
                    slow.sendall(b" ")
                    time.sleep(0.1)
                for client in (silent, slow):
                    status, body = answer(client)
                    assert (status, body["error"]["code"]) == (408, "request_timeout")
                return refused
        return False  # it was closed on while it sent

    until(both_held_their_places)
    until(lambda: api.service.concurrency.num_held == 0)
    with closing(connect(api)) as client:
        client.sendall(post(json.dumps(WHOLE).encode(), more="connection: close\r\n"))
        assert answer(client)[0] == 200


def test_a_client_that_goes_in_the_middle_of_its_body_gives_its_place_back(api: ServedApi) -> None:
    def counts_as_disconnected() -> bool:
        """And not as timed out, unless the machine was too slow."""
        num_before = num_ended(api, "disconnected")
        with closing(connect(api)) as client:
            client.sendall(post(b'{"model"', length=1000))
            until(lambda: api.service.concurrency.num_held == 1 or is_answered(client))
        until(lambda: api.service.concurrency.num_held == 0)
        return num_ended(api, "disconnected") == num_before + 1

    until(counts_as_disconnected)


def test_large_headers_and_bodies_are_refused(api: ServedApi) -> None:
    with closing(connect(api)) as client:
        client.sendall(post(b"{}", more=f"x-much: {'a' * 2048}\r\nconnection: close\r\n"))
        status, body = answer(client)
        assert (status, body["error"]["code"]) == (431, "headers_too_large")
    with closing(connect(api)) as client:
        client.sendall(post(b"{}", length=5000))
        status, body = answer(client)
        assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_goes_on_sending_too_much_reads_why(api: ServedApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed on, it would be reset, and the answer lost with what it had not read."""
    monkeypatch.setattr("cluster.ingress.lingering.LINGER_S", 60.0)
    num_ended_before = num_ended(api)
    with closing(connect(api)) as client:
        client.sendall(post(b"{}", length=4_000_002, more="connection: close\r\n"))
        until(lambda: num_ended(api) > num_ended_before)  # the answer is on its way
        for _ in range(10):
            time.sleep(0.02)
            client.sendall(b" " * 400_000)
        status, body = answer(client)
        assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_stream_that_nobody_takes_ends(api: ServedApi) -> None:
    num_before = num_ended(api, "stalled")
    with closing(connect(api)) as client:
        client.sendall(post(json.dumps({**FLOOD, "stream": True}).encode()))
        until(lambda: num_ended(api, "stalled") == num_before + 1)
        until(lambda: api.service.concurrency.num_held == 0)
        until(lambda: api.engine.stats().num_running == 0)


def num_ended(api: ServedApi, label: str = "") -> int:
    """Requests, of that outcome or of any."""
    return sum(count for _, outcome, count in api.service.counter.items() if label in ("", outcome.label))


def test_a_stream_that_lasts_too_long_ends_with_an_error(tmp_path: Path) -> None:
    body = {**FLOOD, "stream": True}
    path = write_config(tmp_path / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    limits = IngressSection(max_stream_s=0.3)
    with serve(engine_config(path), limits, SEND_BUFFER_BYTES) as api:

        def begun_and_ended() -> bool:
            """Whether the stream had begun; if the machine took longer for its first token, the answer is an error."""
            with closing(connect(api)) as client:
                client.sendall(post(json.dumps(body).encode(), more="connection: close\r\n"))
                received = b""
                while chunk := client.recv(65536):
                    received += chunk
            error = [line for line in received.splitlines() if line.startswith(b'data: {"error"')]
            if error:
                assert json.loads(error[0][6:])["error"]["code"] == "timeout"
            return bool(error)

        until(begun_and_ended)
        until(lambda: api.engine.stats().num_running == 0)
