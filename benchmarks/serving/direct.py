"""The direct path, for comparison: HTTP straight into the engine's own process, with no ingress, router or Ray between.

What a deployment would need besides (HAProxy, a router that it asks) is left out, so this is the best it could do.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from cluster.reports import ReplicaReport
from cluster.serve_file import load_serve_file
from engine.async_engine import AsyncEngine
from engine.types import GenerationRequest, ModelInfo, RequestOutput

START_TIMEOUT_S = 60.0


class EngineBackend:
    """A `cluster.ingress.backend.Backend` over an engine of this process."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def start(self) -> None:
        """The engine runs already."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        return self._engine.generate(request)

    def num_replicas(self) -> int:
        return 1

    async def info(self) -> ModelInfo:
        return self._engine.info

    async def reports(self) -> list[ReplicaReport]:
        engine = self._engine
        return [ReplicaReport("direct", os.getpid(), engine.info, engine.stats(), engine.totals())]


async def serve(serve_yaml: str, port: int) -> None:
    config = load_serve_file(serve_yaml).config
    engine = await AsyncEngine.start(config.engine_config())
    model = ServedModel(engine.info.name, EngineBackend(engine), engine.tokenizer)
    api = create_api(OpenAIService([model], config.ingress, "direct"))
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="warning", access_log=False))
    await server.serve()
    await engine.stop()


@contextmanager
def running(serve_yaml: Path, port: int) -> Iterator[str]:
    """A server in a process of its own; yields its URL."""
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([sys.executable, "-m", "benchmarks.serving.direct", str(serve_yaml), str(port)]) as process:
        try:
            _wait_until_ready(url, process)
            yield url
        finally:
            process.terminate()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the direct server did not start within {START_TIMEOUT_S:g} s")


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
