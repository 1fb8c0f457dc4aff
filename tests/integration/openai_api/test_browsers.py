"""What a browser asks before a page's script may speak to the API."""

from __future__ import annotations

import httpx
import pytest

from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from engine.async_engine import AsyncEngine
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.openai_api.calls import COMPLETION
from tests.integration.served_api import MODEL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE, STRANGER = "https://chat.example", "https://elsewhere.example"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}


@pytest.mark.parametrize(("allowed", "origin"), [([PAGE], PAGE), (["*"], STRANGER), ([PAGE], STRANGER), ([], PAGE)])
async def test_only_allowed_pages_may_ask_and_read(engine: AsyncEngine, allowed: list[str], origin: str) -> None:
    may = origin in allowed or "*" in allowed
    config = IngressSection(allowed_origins=allowed)
    service = OpenAIService([ServedModel(MODEL, InProcessBackend(engine), engine.tokenizer)], config, "ingress")
    transport = httpx.ASGITransport(create_api(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        asked = await client.options("/v1/completions", headers={"origin": origin, **PREFLIGHT})
        refused, answered = [
            await client.post("/v1/completions", json=body, headers={"origin": origin}) for body in ({}, COMPLETION)
        ]
    assert (asked.status_code == 200) is may
    assert (refused.status_code, answered.status_code) == (400, 200)
    for answer in (asked, refused, answered):
        assert ("access-control-allow-origin" in answer.headers) is may
