"""A whole cluster on this machine: private Redis, a Ray head, the Serve application of a YAML file; and its end.

with LocalCluster.start("deploy/serve/demo.yaml") as cluster:
    httpx.get(f"{cluster.url}/v1/models")
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.serve.handle import DeploymentHandle

from cluster.controller_client import ControllerClient
from cluster.driver import connect
from cluster.errors import ClusterError
from cluster.local.processes import is_port_free
from cluster.local.ray_head import HOST, RayHead
from cluster.local.redis_server import RedisServer, RedisUnavailableError, resolve_redis
from cluster.local.scratch import Scratch
from cluster.names import engine_deployments, is_engine_deployment
from cluster.serve_file import ServeFile, load_serve_file
from engine.models.spec import read_config
from engine.text.tokenizer import load_tokenizer
from engine.types import ModelInfo
from engine.weights.safetensors import check_checkpoint

READY_TIMEOUT_S = 300.0  # a large checkpoint takes minutes to load
POLL_S = 0.2
# How an exception that ends with one of our sentences looks inside Serve's status message.
OUR_ERROR = re.compile(r"^(?:\w+\.)*(?:ConfigError|ClusterConfigError|CheckpointError): (.+)$", re.MULTILINE)


class ServeUnavailableError(ClusterError):
    """Serve does not answer now, in one sentence."""


class LocalCluster:
    """Made by `start`, ended by `stop` or by leaving the with-block."""

    def __init__(self, file: ServeFile, scratch: Scratch) -> None:
        self._file = file
        self._scratch = scratch
        self._redis = resolve_redis(scratch.path / "redis")
        self._head = RayHead(scratch.path, _num_cpus(file), file.http_port)
        self._connected = False

    @classmethod
    def start(cls, config: str | Path | ServeFile, port: int | None = None) -> LocalCluster:
        """Start everything and return once the API answers with all replicas.

        ``config``: a Serve YAML file; ``port`` overrides its HTTP port. Raises ConfigError for a bad configuration,
        CheckpointError for missing or corrupt weights, ClusterError for the rest; then nothing is left running.
        """
        file = config if isinstance(config, ServeFile) else load_serve_file(config)
        file = file.on(HOST, file.http_port if port is None else port)
        check_before_start(file)
        _reach_without_proxy(HOST)
        cluster = cls(file, Scratch.create())
        try:
            cluster._start()
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def stop(self) -> None:
        """End every process that was started, and no other; remove what they wrote."""
        if self._connected:
            self._connected = False
            ray.shutdown()
        self._head.stop()
        self._redis.stop()
        self._scratch.remove()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._file.http_port}"

    @property
    def gcs_address(self) -> str:
        """What ``ray.init(address=...)`` takes, on this machine only."""
        return self._head.gcs_address

    @property
    def dashboard_url(self) -> str:
        """What ``serve status -a`` takes; http://127.0.0.1:8265, the default, if that was free."""
        return self._head.dashboard_url

    @property
    def logs_path(self) -> Path:
        """Where Ray keeps the log files of all processes, ours in worker-*.err, until the cluster ends."""
        return self._scratch.path / "session_latest" / "logs"

    @property
    def file(self) -> ServeFile:
        return self._file

    @property
    def redis(self) -> RedisServer:
        return self._redis

    @property
    def controller(self) -> ControllerClient:
        """The controller actor's methods, as plain calls."""
        self._connect()
        return ControllerClient(self._file.app_name)

    def engine_handle(self) -> DeploymentHandle:
        """A Serve handle of the first model's engine replicas, for measurements without HTTP."""
        self._connect()
        deployments = engine_deployments([config.model.served_name for config in self._file.configs])
        return serve.get_deployment_handle(deployments[0], self._file.app_name)

    def model_info(self) -> ModelInfo:
        info: ModelInfo = self.engine_handle().info.remote().result(timeout_s=30)
        return info

    def deploy(self, file: ServeFile) -> None:
        """What ``serve deploy`` does; see `wait_ready`. Raises ClusterError."""
        with _asking_serve():
            ServeSubmissionClient(self._head.dashboard_url).deploy_applications(file.document)

    def serve_details(self) -> dict[str, Any]:
        """What ``serve status`` goes by. Raises ServeUnavailableError."""
        with _asking_serve():
            details: dict[str, Any] = ServeSubmissionClient(self._head.dashboard_url).get_serve_details()
        return details

    def redeploy(self, file: ServeFile) -> None:
        """Serve ``file`` from now on, at the same address; returns once its replicas answer. Raises ClusterError."""
        before = set(self.replica_ids())
        self._file = file.on(HOST, self._file.http_port)
        self.deploy(self._file)
        self._wait_until(lambda: not before & set(self.replica_ids()), "the old replicas were still there")
        self.wait_ready()

    def replica_ids(self) -> list[str]:
        """Of the engine replicas that Serve runs now."""
        app = self.serve_details()["applications"].get(self._file.app_name, {"deployments": {}})
        return [
            replica["replica_id"]
            for name, deployment in app["deployments"].items()
            if is_engine_deployment(name)
            for replica in deployment["replicas"]
        ]

    def check(self) -> None:
        """Raises ClusterError when the cluster has ended by itself."""
        self._head.check()

    def wait_ready(self) -> None:
        """Return once the API answers with all replicas. Raises ClusterError."""
        self._wait_until(
            lambda: self._is_deployed() and self._num_replicas_answering() >= self._file.num_replicas,
            "the application was not ready",
        )

    def _wait_until(self, holds: Callable[[], bool], otherwise: str) -> None:
        """Raises ClusterError. That Serve cannot be asked once is no reason to give up: it may be busy."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        unanswered = ""
        while time.monotonic() < deadline_s:
            self.check()
            try:
                if holds():
                    return
                unanswered = ""
            except ServeUnavailableError as error:
                unanswered = f": {error}"
            time.sleep(POLL_S)
        raise ClusterError(f"{otherwise} after {READY_TIMEOUT_S:g} s{unanswered}")

    def _start(self) -> None:
        try:
            self._redis.start()
        except RedisUnavailableError as error:
            raise ClusterError(str(error)) from error
        self._head.start({"REDIS_URL": self._redis.url})
        self.deploy(self._file)
        self.wait_ready()

    def _connect(self) -> None:
        """Become a Ray driver of the cluster; only what HTTP cannot do needs it."""
        if not self._connected:
            connect(self._head.gcs_address)
            self._connected = True

    def _is_deployed(self) -> bool:
        """Whether Serve says that the application runs. Raises ClusterError when it never will."""
        app = self.serve_details()["applications"].get(self._file.app_name)
        if app is None:
            return False
        messages = [app["message"], *(deployment["message"] for deployment in app["deployments"].values())]
        # A configuration that cannot work fails again however often Serve tries it: no use waiting.
        if found := next((match for message in messages if (match := OUR_ERROR.search(message))), None):
            raise ClusterError(found[1])
        if app["status"] == "DEPLOY_FAILED":
            raise ClusterError(f"the application could not be deployed: {_last_line(messages)}")
        running: bool = app["status"] == "RUNNING"
        return running

    def _num_replicas_answering(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as response:
                return int(json.load(response)["replicas"])
        except (OSError, ValueError, KeyError, HTTPException):
            return 0


@contextmanager
def _asking_serve() -> Iterator[None]:
    """What Ray's client raises when the dashboard, or Serve behind it, does not answer or has no answer."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # of requests, all are OSErrors
        raise ServeUnavailableError(f"Serve cannot be asked: {' '.join(str(error).split())}") from error


def check_before_start(file: ServeFile) -> None:
    """Whatever can be known to fail without starting a process. Raises like `LocalCluster.start`."""
    if not is_port_free(file.http_port, HOST):
        raise ClusterError(f"port {file.http_port} of {HOST} is in use; choose another one with --port")
    for config in file.configs:
        model = config.engine_config().model
        directory = Path(model.path)
        read_config(directory)
        load_tokenizer(directory)
        if model.load_format == "safetensors":
            check_checkpoint(directory)


def _reach_without_proxy(host: str) -> None:
    """By this process and all that it starts, whatever proxy the environment names for the world outside."""
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if host not in hosts.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (hosts, host)))


def _num_cpus(file: ServeFile) -> int:
    """What Ray may hand out: enough for every replica to be placed, whatever the machine has."""
    needed = sum(config.max_replicas * config.cpus_per_replica for config in file.configs)
    return max(os.cpu_count() or 1, int(needed) + 1)


def _last_line(messages: list[str]) -> str:
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "Serve gave no reason"
