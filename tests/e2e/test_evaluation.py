"""Evaluation through a server: the same log-likelihoods and texts as from an engine in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.quality.questions import make_request
from benchmarks.quality.scorers import EngineScorer, ServerScorer
from cluster.local import LocalCluster
from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.engine import Engine
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.cluster

QUESTIONS = [("The lamp burns", " low tonight"), ("Question: why?\nAnswer:", " because"), ("以下是", "考试")]


def test_a_server_scores_and_continues_as_an_engine_does(
    cluster: LocalCluster, serve_document: Callable[..., dict[str, Any]]
) -> None:
    path = serve_document()["applications"][0]["args"]["model"]["path"]
    engine = Engine(EngineConfig(ModelConfig(path, load_format="random"), CacheConfig(num_blocks=64), device="cpu"))
    server, here = ServerScorer(cluster.url, MODEL), EngineScorer(engine, 0)
    requests = [make_request(context, continuation, engine.tokenizer.encode) for context, continuation in QUESTIONS]
    by_server, by_engine = server.token_scores(requests), here.token_scores(requests)
    for one, other in zip(by_server, by_engine, strict=True):
        assert [token.logprob for token in one] == pytest.approx([token.logprob for token in other], abs=1e-4)
        assert [token.is_greedy for token in one] == [token.is_greedy for token in other]
    assert server.score(requests) == pytest.approx(here.score(requests), abs=1e-3)
    prompts = [request.ids for request in requests]
    lengths = [len(tokens) for tokens in server.continue_greedily(prompts, 12)]
    assert lengths == [len(tokens) for tokens in here.continue_greedily(prompts, 12)]
