"""Evaluation through a server: the same log-likelihoods and texts as from an engine in this process."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.questions import make_request
from benchmarks.quality.scorers import EngineScorer, ServerScorer
from cluster.local.cluster import LocalCluster
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.engine import Engine
from tests.e2e.conftest import MODEL
from tests.models import PROJECT_ROOT

pytestmark = pytest.mark.cluster

COPA_ROW = json.dumps(
    {"premise": "It rained.", "choice1": "The road got wet.", "choice2": "He ate.", "question": "effect", "label": 0}
)
TEXT = "The lamp burns low tonight, and nobody has come to trim it. " * 20
QUESTIONS = [("The lamp burns", " low tonight"), ("Question: why?\nAnswer:", " because"), ("以下是", "考试")]


def test_a_server_scores_and_continues_as_an_engine_does(
    cluster: LocalCluster, serve_document: Callable[..., dict[str, Any]]
) -> None:
    path = serve_document()["applications"][0]["args"]["model"]["path"]
    engine = Engine(EngineConfig(ModelConfig(path, load_format="random"), CacheConfig(num_blocks=64), device="cpu"))
    server, here = ServerScorer(cluster.url, MODEL, "none"), EngineScorer(engine, 0)
    requests = [make_request(context, continuation, engine.tokenizer.encode) for context, continuation in QUESTIONS]
    by_server, by_engine = server.token_scores(requests), here.token_scores(requests)
    for one, other in zip(by_server, by_engine, strict=True):
        assert [token.logprob for token in one] == pytest.approx([token.logprob for token in other], abs=1e-4)
        assert [token.is_greedy for token in one] == [token.is_greedy for token in other]
    assert server.score(requests) == pytest.approx(here.score(requests), abs=1e-3)
    prompts = [request.ids for request in requests]
    lengths = [len(tokens) for tokens in server.continue_greedily(prompts, 12)]
    assert lengths == [len(tokens) for tokens in here.continue_greedily(prompts, 12)]


def test_the_tool_pins_each_level_and_lets_go(
    cluster: LocalCluster, serve_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    for name, text in {"eval/copa_dev.jsonl.gz": COPA_ROW, "text/gutenberg_heldout.txt.gz": TEXT}.items():
        (tmp_path / name).parent.mkdir()
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(text)
    model = serve_document()["applications"][0]["args"]["model"]["path"]
    command = f"""{sys.executable} -m benchmarks.quality.evaluate --base-url {cluster.url} --name {MODEL}
        --tokenizer {model} --data {tmp_path} --tasks copa --texts gutenberg --sequences 2 --tokens 96 --levels 0,1
        --settle-s 0 --max-model-len 512 --out {tmp_path / "evaluation.json"}"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_ADDRESS"] = cluster.gcs_address
    ran = subprocess.run(command.split(), env=environment, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    exact, dimmed = json.loads((tmp_path / "evaluation.json").read_text())["levels"]
    assert exact["texts"]["gutenberg"]["dnll"] == 0 and exact["texts"]["gutenberg"]["agreement"] == 1
    assert dimmed["texts"]["gutenberg"]["dnll"] != 0
    assert exact["generation"]["mean_tokens"] > 0 and exact["generation"]["same_frac"] == 1
    (model_status,) = cluster.controller.status()["models"].values()
    assert (model_status["policy"]["law"], model_status["policy"]["level"]) == ("static", 0)  # as deployed
