"""A Ray head node takes no other cluster's dashboard for its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from cluster.local import ray_head
from cluster.local.ray_head import RayHead


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's does, for the session named in the class."""

    session = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2", "session_name": self.session}).encode())

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_only_the_own_session_counts_as_started(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "session_ours").mkdir()
    (tmp_path / "session_latest").symlink_to("session_ours")
    (tmp_path / "ray.log").touch()
    head = RayHead(tmp_path, num_cpus=1, http_port=1)
    monkeypatch.setattr(head, "check", lambda: None)  # no process of Ray here
    head.dashboard_url = url
    monkeypatch.setattr(Dashboard, "session", "session_ours")
    head._wait_for_dashboard()
    monkeypatch.setattr(Dashboard, "session", "session_theirs")
    monkeypatch.setattr(ray_head, "START_TIMEOUT_S", 0.3)
    with pytest.raises(ClusterError, match="did not start"):
        head._wait_for_dashboard()
