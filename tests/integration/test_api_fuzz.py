"""Schemathesis against the OpenAPI document: whatever a client sends, no answer is a 500, and every answer is as said.

Most of the generated bodies name the served model and ask for few tokens, so that they reach the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.ingress.config import IngressSection
from tests.integration.served_api import CONTEXT_TOKENS, MODEL, ServedApi, engine_config, serve
from tests.models import write_config

NUM_EXAMPLES = 30  # for each operation
MAX_TOKENS = 4
EXPECTED = (200, 400, 403, 404, 413, 431, 503)
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApi]:
    path = write_config(tmp_path_factory.mktemp("models") / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    with serve(engine_config(path), IngressSection(max_body_bytes=64 * 1024)) as api:
        yield api


def tamed(body: Any) -> Any:
    """A body that names the model and does not ask for more tokens than a test has time for."""
    if not isinstance(body, dict) or "model" not in body:
        return body
    body = {**body, "model": MODEL}
    if body.get("prompt") and body.get("messages"):  # either will do for /tokenize
        del body["messages"]
    if "prompt" in body or "messages" in body:
        for field in ("max_tokens", "max_completion_tokens"):
            if not isinstance(body.get(field), int) or body[field] > MAX_TOKENS:
                body[field] = MAX_TOKENS
        if isinstance(body.get("min_tokens"), int):
            body["min_tokens"] = body["min_tokens"] % MAX_TOKENS
        if isinstance(body.get("n"), int):
            body["n"] = 1 + body["n"] % 2
        for field, (least, most) in {"temperature": (0, 2), "presence_penalty": (-2, 2), "top_p": (0.01, 1)}.items():
            if isinstance(body.get(field), (int, float)):
                body[field] = min(max(body[field], least), most)
    return body


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_is_a_server_error(api: ServedApi, mode: GenerationMode) -> None:
    """Positive mode draws what the document allows, negative mode what it does not."""
    statuses: set[tuple[str, int]] = set()
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            if mode is GenerationMode.NEGATIVE and operation.method == "get":
                continue  # it takes nothing that could be wrong
            probe(operation.as_strategy(generation_mode=mode), session, statuses)
    refused = {(path, 400) for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")}
    assert refused <= statuses
    if mode is GenerationMode.POSITIVE:
        assert {(path, 200) for path, _ in refused} <= statuses
        assert {("/v1/models/{name}", 404), ("/v1/brownout", 403)} <= statuses


def probe(cases: Any, session: requests.Session, statuses: set[tuple[str, int]]) -> None:
    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases, as_drawn=st.integers(0, 3))
    def run(case: Case, as_drawn: int) -> None:
        if as_drawn:
            case.body = tamed(case.body)
        response = case.call(session=session, timeout=60)
        statuses.add((case.operation.path, response.status_code))
        assert response.status_code in EXPECTED, response.text
        case.validate_response(response, checks=CHECKS)

    run()
