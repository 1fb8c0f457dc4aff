"""Two models behind one ingress, from one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.local.cluster import LocalCluster
from cluster.serve_file import parse_serve_document
from tests.e2e.conftest import ADMIN_TOKEN, CONTEXT_TOKENS, MODEL, Metrics
from tests.models import write_config
from tests.waiting import until

pytestmark = pytest.mark.cluster


def test_each_model_has_its_own_replicas(
    serve_document: Callable[..., dict[str, Any]], tmp_path: Path, read_metrics: Callable[[str], Metrics]
) -> None:
    document = serve_document(replicas=1)
    args = document["applications"][0]["args"]
    other = write_config(tmp_path / "other", hidden_size=32)
    first, second = args.pop("model"), {"path": str(other), "load_format": "random", "max_model_len": 128}
    args["models"] = [{"model": first}, {"model": second, "slo": {"ttft_s": 9.0, "tpot_s": 0.9}}]
    with LocalCluster.start(parse_serve_document(document)) as cluster:
        with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as api:
            lengths = {model.id: model.max_model_len for model in api.models.list()}
            assert lengths == {MODEL: CONTEXT_TOKENS, "other": 128}
            for model in (MODEL, "other"):
                answer = api.completions.create(model=model, prompt="Hello", max_tokens=4)
                assert answer.model == model
                assert answer.usage.completion_tokens == 4
            with pytest.raises(openai.NotFoundError, match=f"'{MODEL}', 'other'"):
                api.completions.create(model="nobody", prompt="Hello", max_tokens=4)
        assert read_metrics(cluster.url).label_values("model") >= {MODEL, "other"}

        def known_to_the_controller() -> set[str]:
            return set(httpx.get(f"{cluster.url}/v1/brownout", timeout=60).json().get("models", ()))

        until(lambda: known_to_the_controller() == {MODEL, "other"})
        pinned = httpx.put(
            f"{cluster.url}/v1/brownout",
            json={"level": 1, "model": "other"},
            headers={"authorization": f"Bearer {ADMIN_TOKEN}"},
            timeout=60,
        ).json()["models"]
        assert {name: model["policy"]["level"] for name, model in pinned.items()} == {MODEL: 0, "other": 1}
        until(lambda: httpx.get(f"{cluster.url}/ready", timeout=60).json()["replicas"] == 2)
