"""A small streaming completions server on a real socket, whose answer is chosen by the request's model name."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

BROWNOUT = {
    "dimmed_share": 0.25,
    "routed_pairs": 80,
    "dimmed_pairs": 20,
    "level_peak": 3,
    "level_mean": 1.5,
    "setting_version": 9,
}


def event(**fields) -> bytes:
    return f"data: {json.dumps(fields)}\r\n\r\n".encode()


def token_event(text: str) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": None}], usage=None)


def usage_event(body) -> bytes:
    counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    return event(choices=[], usage={**counts, "brownout": BROWNOUT})


async def complete(body) -> AsyncIterator[bytes]:
    """Tokens two by two, in pieces that respect no event's boundary."""
    events = b": hello\n\n" + b"".join(token_event("ab") for _ in range(0, body["max_tokens"], 2))
    stream = events + usage_event(body) + b"data: [DONE]\n\n"
    for start in range(0, len(stream), 37):
        yield stream[start : start + 37]
        await asyncio.sleep(0)


async def when_told(body, told) -> AsyncIterator[bytes]:
    """A token each time that the test says so."""
    await told.acquire()
    yield token_event("a")
    await told.acquire()
    yield token_event("b") + usage_event(body) + b"data: [DONE]\n\n"


async def error_event(body) -> AsyncIterator[bytes]:
    yield token_event("a")
    yield event(error={"message": "the replica died", "type": "server_error", "param": None, "code": "replica_died"})
    yield b"data: [DONE]\n\n"


async def cut(body) -> AsyncIterator[bytes]:
    yield token_event("a")
    raise ConnectionError("the server's end of the connection goes away")


async def no_done(body) -> AsyncIterator[bytes]:
    yield token_event("a") + usage_event(body)


async def stall(body) -> AsyncIterator[bytes]:
    yield token_event("a")
    await asyncio.sleep(3600)


async def broken_json(body) -> AsyncIterator[bytes]:
    yield b'data: {"choices": [\n\n'


async def no_usage(body) -> AsyncIterator[bytes]:
    yield token_event("a") + b"data: [DONE]\n\n"


async def usage_without_counts(body) -> AsyncIterator[bytes]:
    yield token_event("a") + event(choices=[], usage={"tokens": 3}) + b"data: [DONE]\n\n"


STREAMS = {
    f.__name__: f
    for f in (
        complete,
        error_event,
        cut,
        no_done,
        stall,
        broken_json,
        no_usage,
        usage_without_counts,
    )
}
STATUSES = {"busy": 429, "unavailable": 503, "broken": 500, "missing": 404}


class CompletionServer:
    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.told = asyncio.Semaphore(0)
        self.url = ""
        self.app = FastAPI()
        self.app.post("/v1/completions")(self.completions)

    async def completions(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        if status := STATUSES.get(body["model"]):
            return JSONResponse({"error": {"message": "no"}}, status)
        stream = when_told(body, self.told) if body["model"] == "when_told" else STREAMS[body["model"]](body)
        return StreamingResponse(stream, media_type="text/event-stream")


@pytest.fixture
async def completion_server() -> AsyncIterator[CompletionServer]:
    handler = CompletionServer()
    config = uvicorn.Config(
        handler.app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    handler.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield handler
    server.should_exit = True
    await serving
