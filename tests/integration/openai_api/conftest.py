"""The API over a real engine in this process, asked without sockets. Ray comes in tests/e2e."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
import pytest_asyncio

from cluster.ingress.config import IngressSection
from cluster.ingress.routes import create_api
from cluster.ingress.service import OpenAIService, ServedModel
from engine.async_engine import AsyncEngine
from tests.integration.in_process_backend import InProcessBackend
from tests.integration.openai_api.calls import CONTEXT_TOKENS, MAX_BODY_BYTES, MAX_REQUESTS
from tests.integration.served_api import MODEL, engine_config
from tests.models import write_config


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL)
    engine = await AsyncEngine.start(engine_config(path, context_tokens=CONTEXT_TOKENS))
    yield engine
    await engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    config = IngressSection(max_body_bytes=MAX_BODY_BYTES, max_concurrent=MAX_REQUESTS)
    service = OpenAIService([ServedModel(MODEL, InProcessBackend(engine), engine.tokenizer)], config, "ingress")
    transport = httpx.ASGITransport(create_api(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(client: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)
