"""What the proxy in front does to clients that send slowly or open too much, on real sockets through the whole path."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest

from cluster.local import LocalCluster
from tests.e2e.conftest import HEADER_TIMEOUT_S, MAX_CLIENT_CONNECTIONS, MODEL, Metrics

pytestmark = pytest.mark.cluster

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
SLACK_S = 3.0  # beyond a timeout, on a busy machine


@contextmanager
def connected(cluster: LocalCluster) -> Iterator[socket.socket]:
    place = urlsplit(cluster.url)
    with closing(socket.create_connection((place.hostname, place.port), timeout=HEADER_TIMEOUT_S + SLACK_S)) as client:
        yield client


def last_words(client: socket.socket) -> bytes:
    """Everything until the other side closes."""
    received = b""
    with suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            received += chunk
    return received


def serves(cluster: LocalCluster) -> bool:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
    return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=30).status_code == 200


def test_slow_requests_are_cut_off_wherever_they_are_slow(
    cluster: LocalCluster, read_metrics: Callable[[str], Metrics]
) -> None:
    with connected(cluster) as silent, connected(cluster) as header, connected(cluster) as body:
        header.sendall(POST + b"x-slow: ")
        body.sendall(POST + b"content-length: 1000\r\n\r\n{")
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < HEADER_TIMEOUT_S - 0.5:  # byte by byte: it is the whole that counts
            header.sendall(b"x")
            body.sendall(b" ")
            time.sleep(0.2)
        assert serves(cluster)
        assert b" 408 " in last_words(header)
        assert b" 408 " in last_words(silent)
        assert b'"request_timeout"' in body.recv(65536)  # the proxy still waits for the rest; the ingress does not
    assert read_metrics(cluster.url).total("http_requests_held") == 0


def test_one_client_cannot_take_all_connections(cluster: LocalCluster) -> None:
    with ExitStack() as stack:
        clients, num_reset = [], 0
        for _ in range(MAX_CLIENT_CONNECTIONS + 50):
            try:
                clients.append(stack.enter_context(connected(cluster)))
            except ConnectionResetError:  # the proxy was quicker with its reset than we with the handshake
                num_reset += 1
        time.sleep(0.3)
        closed, _, _ = select.select(clients, [], [], 0)  # the others are still asked for their headers
        assert 40 <= num_reset + len(closed) <= 60  # the proxy's threads count side by side
    assert serves(cluster)
