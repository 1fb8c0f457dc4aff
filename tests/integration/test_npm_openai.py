"""The npm package `openai` against the API, where Node.js and the package are installed:
npm install --prefix tests/integration/node
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.ingress.config import IngressSection
from tests.integration.served_api import CONTEXT_TOKENS, MODEL, engine_config, serve
from tests.models import write_config
from tests.waiting import until

FOLDER = Path(__file__).parent / "node"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or not (FOLDER / "node_modules/openai").exists(),
    reason="needs Node.js and npm install --prefix tests/integration/node",
)


def test_the_npm_client(tmp_path: Path) -> None:
    path = write_config(tmp_path / MODEL, max_position_embeddings=CONTEXT_TOKENS)
    with serve(engine_config(path), IngressSection()) as api:
        command = ["node", str(FOLDER / "client.mjs"), f"{api.url}/v1", MODEL]
        seen = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
        until(lambda: not api.service.concurrency.num_held)  # its last stream, which it left
    assert seen["models"] == [MODEL]
    assert seen["streamed"] == seen["whole"]
    assert seen["call"]["name"] == "look" and seen["call"]["reason"] == "tool_calls"
    assert seen["call"]["arguments"]["at"] in ("north", "south") and seen["json"]["at"] in ("north", "south")
    assert seen["logprobs"] == [4, 4]
    assert seen["errors"] == [
        ["BadRequestError", "max_tokens", "invalid_request_error"],
        ["NotFoundError", "model", "invalid_request_error"],
    ]
    assert seen["chunksBeforeLeaving"] == 3
