"""Requests that the API's tests send, and the limits that they meet."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.integration.served_api import MODEL

CONTEXT_TOKENS = 128
MAX_BODY_BYTES = 16 * 1024
MAX_REQUESTS = 16  # that the ingress holds at once
COMPLETION = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}


async def post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(f"/v1/{path}", content=content, headers=headers)
