"""What the proxy in front does to clients that send slowly or open too much, on real sockets through the whole path."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from urllib.parse import urlsplit

import httpx
import pytest

from cluster.local.cluster import LocalCluster
from tests.e2e.conftest import HEADER_TIMEOUT_S, MAX_CLIENT_CONNECTIONS, MODEL, Metrics
from tests.waiting import until

pytestmark = pytest.mark.cluster

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
TIMEOUT_S = 60.0


@contextmanager
def connected(cluster: LocalCluster) -> Iterator[socket.socket]:
    place = urlsplit(cluster.url)
    with closing(socket.create_connection((place.hostname, place.port), timeout=TIMEOUT_S)) as client:
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
    try:
        return httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=TIMEOUT_S).status_code == 200
    except httpx.TransportError:  # refused: the proxy has not yet seen all others go
        return False


def drip(client: socket.socket, byte: bytes, until_s: float) -> None:
    """Send byte by byte until the other side has said something, or closes."""
    with suppress(ConnectionError):
        while time.monotonic() < until_s and not select.select([client], [], [], 0.2)[0]:
            client.sendall(byte)


def test_slow_requests_are_cut_off_wherever_they_are_slow(
    cluster: LocalCluster, read_metrics: Callable[[str], Metrics]
) -> None:
    until(lambda: are_told_why(cluster))
    until(lambda: read_metrics(cluster.url).total("http_requests_held") == 0)


def are_told_why(cluster: LocalCluster) -> bool:
    """All three; not if one was reset, because it sent a byte just when the other side closed, and lost its answer."""
    with connected(cluster) as silent, connected(cluster) as header, connected(cluster) as body:
        header.sendall(POST + b"x-slow: ")
        body.sendall(POST + b"content-length: 1000\r\n\r\n{")
        until_s = time.monotonic() + TIMEOUT_S
        dripping = threading.Thread(target=drip, args=(body, b" ", until_s))
        dripping.start()
        drip(header, b"x", until_s)  # it is the whole that counts
        dripping.join()
        assert serves(cluster)
        assert b" 408 " in last_words(silent)
        if not (words := last_words(header)):
            return False
        assert b" 408 " in words
        refusal = b""
        with suppress(ConnectionResetError):
            while b'"request_timeout"' not in refusal:  # the proxy still waits for the rest; the ingress does not
                chunk = body.recv(65536)
                assert chunk, refusal
                refusal += chunk
            return True
        return False


def test_one_client_cannot_take_all_connections(cluster: LocalCluster) -> None:
    refused: list[int] = []

    def opened_in_time() -> bool:
        """Whether none of the first had to leave, for want of headers, before the last one came."""
        until(lambda: serves(cluster))
        begun_s = time.monotonic()
        with ExitStack() as stack:
            clients, num_reset = [], 0
            for _ in range(MAX_CLIENT_CONNECTIONS + 50):
                try:
                    clients.append(stack.enter_context(connected(cluster)))
                except ConnectionResetError:  # the proxy was quicker with its reset than we with the handshake
                    num_reset += 1
            took_s = time.monotonic() - begun_s
            refused.append(num_reset + sum(b" 408 " not in last_words(client) for client in clients))
        return took_s < HEADER_TIMEOUT_S / 2

    until(opened_in_time)
    assert 40 <= refused[-1] <= 60  # the proxy's threads count side by side
    until(lambda: serves(cluster))
