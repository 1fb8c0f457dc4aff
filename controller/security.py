"""TLS and the shared token of the control streams, at the controller's end."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from controller.config import StreamSecurity, require

log = logging.getLogger(__name__)


def read_token(path: str) -> str:
    """The shared token; empty without a file. OSError if it cannot be read, ConfigError if nothing is in it."""
    if not path:
        return ""
    token = Path(path).read_text(encoding="utf-8").strip()
    require(bool(token), "controller.security.token_file", path, "a file with a token in it")
    return token


def read_security(security: StreamSecurity) -> tuple[str, grpc.ServerCredentials | None]:
    """The token, and TLS credentials if configured. OSError if a file cannot be read."""
    token = read_token(security.token_file)
    if not security.has_tls:
        return token, None
    pair = (Path(security.key_file).read_bytes(), Path(security.cert_file).read_bytes())
    return token, grpc.ssl_server_credentials([pair])


def log_security(host: str, has_token: bool, has_tls: bool) -> None:
    """Say who can reach the streams."""
    missing = [name for name, has in (("TLS", has_tls), ("a token", has_token)) if not has]
    if missing:
        log.warning(
            "control streams run without %s: reachable at %s only, by whoever reaches that address",
            " and ".join(missing),
            "loopback" if host in ("localhost", "127.0.0.1", "::1") else f"the private address {host}",
        )
