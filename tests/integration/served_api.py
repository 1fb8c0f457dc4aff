"""The API over HTTP in a thread of this process: a real engine with a tiny model behind uvicorn, for real clients."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from engine.async_engine import AsyncEngine
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from tests.integration.in_process_backend import InProcessBackend

MODEL = "tiny"
CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class ServedApi:
    url: str
    engine: AsyncEngine
    service: OpenAIService


def engine_config(model_path: Path, load_format: str = "random", context_tokens: int = CONTEXT_TOKENS) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(str(model_path), load_format=load_format, max_model_len=context_tokens),
        cache=CacheConfig(num_blocks=256),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
        brownout=BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0, allow_unmeasured=True, profile_repeats=0),
        num_threads=1,
        stream_interval_s=0,
    )


@contextmanager
def serve(config: EngineConfig, ingress: IngressSection, send_buffer_bytes: int = 0) -> Iterator[ServedApi]:
    """Serves until the block ends. ``send_buffer_bytes`` of each connection in the kernel; 0: as it likes."""
    started: list[ServedApi] = []
    ready, stop = threading.Event(), threading.Event()

    async def run() -> None:
        engine = await AsyncEngine.start(config)
        service = OpenAIService([ServedModel(MODEL, InProcessBackend(engine), engine.tokenizer)], ingress, "ingress")
        server = uvicorn.Server(uvicorn.Config(create_api(service), log_level="warning"))
        listening = socket.create_server(("127.0.0.1", 0))
        if send_buffer_bytes:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = listening.getsockname()
        started.append(ServedApi(f"http://{host}:{port}", engine, service))
        ready.set()
        await asyncio.to_thread(stop.wait)
        server.should_exit = True
        await serving
        await engine.stop()

    def main() -> None:
        try:
            asyncio.run(run())
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="served-api", daemon=True)
    thread.start()
    ready.wait()
    if not started:
        raise RuntimeError("the API did not start")
    try:
        yield started[0]
    finally:
        stop.set()
        thread.join()
