"""Every mistake in a configuration is one sentence that names key, value and what is allowed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfigError, parse_config, parse_models, resolve_path
from cluster.names import engine_deployments
from cluster.serve_file import load_serve_file
from tests.models import PROJECT_ROOT

MODEL = {"path": "models/x"}

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "model is missing; it has no default"),
    ({"model": {}}, "model.path is missing; it has no default"),
    ({"model": 3}, "model is 3; allowed: "),
    ({"model": {"path": 4}}, "model.path is 4; allowed: a valid string"),
    ({"model": {"path": "x", "nme": "y"}}, "model.nme is 'y'; allowed: no such key, one of path, name"),
    ({"model": MODEL, "replica": 2}, "replica is 2; allowed: no such key, one of model, cache"),
    ({"model": MODEL, "replicas": 0}, "replicas is 0; allowed: greater than or equal to 1"),
    ({"model": MODEL, "replicas": "2"}, "replicas is '2'; allowed: a valid integer"),
    ({"model": MODEL, "replicas": True}, "replicas is True; allowed: a valid integer"),
    ({"model": MODEL, "device": "tpu"}, "device is 'tpu'; allowed: auto, cpu, cuda"),
    ({"model": MODEL, "brownout": {"ways": [3]}}, "brownout.ways is [3]; allowed: any of [2, 4, 8]"),
    ({"model": MODEL, "slo": {"ttft_s": -1}}, "slo.ttft_s is -1"),
    (
        {"model": MODEL, "controller": {"law": "fuzzy"}},
        "controller.law is 'fuzzy'; allowed: predictive, pi, aimd, static",
    ),
    ({"model": MODEL, "controller": {"lease_s": 0.1}}, "controller.lease_s is 0.1; allowed: more than three ticks"),
    ({"model": MODEL, "ingress": {"max_body_bytes": 1}}, "ingress.max_body_bytes is 1; allowed: "),
    ({"model": MODEL, "admission": {"tenants": {"a b": {}}}}, "tenant is 'a b'; allowed: a letter or digit"),
    ({"model": MODEL, "admission": {"tenants": {"a": {"weight": 0}}}}, "admission: weight is 0.0; allowed: a positive"),
    (
        {"model": MODEL, "admission": {"tenants": {"a": {"rpm": 1}}}},
        "admission.tenants.a.rpm is 1; allowed: no such key",
    ),
]


@pytest.mark.parametrize(("args", "sentence"), MISTAKES, ids=[sentence for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence(args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClusterConfigError) as caught:
        parse_config(args)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_the_engine_gets_what_the_file_says() -> None:
    config = parse_config(
        {
            "model": {"path": "deploy/models/demo-random", "load_format": "random"},
            "brownout": {"ways": [2, 4], "protect": [[0, 1]]},
            "slo": {"ttft_s": 2, "tpot_s": 0.2},
            "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 32},
        }
    )
    engine = config.engine_config()
    assert engine.model.served_name == "demo-random"
    assert Path(engine.model.path) == PROJECT_ROOT / "deploy/models/demo-random"
    assert (engine.brownout.ways, engine.brownout.protect) == ((2, 4), ((0, 1),))
    assert (engine.scheduler.max_num_seqs, engine.slo.ttft_s) == (4, 2)
    controller = config.controller_config("app")
    assert (controller.slo.ttft_s, controller.slo.tpot_s) == (2, 0.2)
    assert controller.key_prefix == "brownoutserve:app"


def test_redis_url_comes_from_the_file_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://of-the-environment")
    assert parse_config({"model": MODEL}).resolved_redis_url() == "redis://of-the-environment"
    assert parse_config({"model": MODEL, "redis_url": "redis://h/1"}).resolved_redis_url() == "redis://h/1"
    for bad in ("", "http://user:secret@host:1/0"):
        monkeypatch.setenv("REDIS_URL", bad)
        with pytest.raises(ClusterConfigError, match=r"^redis_url starts with .*; allowed: redis://, ") as caught:
            parse_config({"model": MODEL}).resolved_redis_url()
        assert "secret" not in str(caught.value)


def test_a_relative_model_path_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("deploy/models/demo-random") == PROJECT_ROOT / "deploy/models/demo-random"
    (tmp_path / "mine").mkdir()
    assert resolve_path("mine") == tmp_path / "mine"
    assert resolve_path("nowhere") == tmp_path / "nowhere"
    assert resolve_path("/models/x") == Path("/models/x")


@pytest.mark.parametrize("path", sorted((PROJECT_ROOT / "deploy/serve").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_serve_files_are_valid(path: Path) -> None:
    file = load_serve_file(path)
    assert file.app_name == "brownoutserve"
    moved = file.on("127.0.0.1", 9)
    assert (moved.http_port, moved.config) == (9, file.config)


def serve_document(**changes: Any) -> dict[str, Any]:
    app = {"name": "a", "import_path": "cluster.app:build", "args": {"model": MODEL}, **changes}
    return {"applications": [app]}


BAD_FILES: list[tuple[str, str]] = [
    ("a: [1", "is not valid YAML"),
    ("just text", "must hold a mapping"),
    (yaml.safe_dump({}), "applications is missing"),
    (yaml.safe_dump(serve_document(import_path="other:build")), "applications.import_path is ['other:build']"),
    (yaml.safe_dump(serve_document(route="/")), "applications.route is '/'; allowed: no such key, one of name"),
    (yaml.safe_dump(serve_document(args={"model": MODEL, "replicas": 0})), "replicas is 0"),
    (yaml.safe_dump({**serve_document(), "http_options": {"port": "x"}}), "http_options.port is 'x'"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_FILES, ids=[sentence for _, sentence in BAD_FILES])
def test_a_bad_serve_file_is_one_sentence_that_names_it(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ClusterConfigError) as caught:
        load_serve_file(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_serve_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ClusterConfigError, match=r"serve\.yaml cannot be read: No such file"):
        load_serve_file(tmp_path / "serve.yaml")


TWO = {
    "replicas": 2,
    "slo": {"ttft_s": 1.0, "tpot_s": 0.1},
    "models": [
        {"model": {"path": "a", "name": "org/small"}},
        {"model": {"path": "b"}, "replicas": 1, "slo": {"ttft_s": 9.0, "tpot_s": 0.9}},
    ],
}


def test_several_models_share_what_stands_beside_them() -> None:
    small, large = parse_models(TWO)
    assert [config.model.served_name for config in (small, large)] == ["org/small", "b"]
    assert [config.replicas for config in (small, large)] == [2, 1]
    assert engine_deployments([config.model.served_name for config in (small, large)]) == [
        "EngineReplica-org-small",
        "EngineReplica-b",
    ]
    assert small.controller_config("app") == large.controller_config("app")
    controller = small.controller_config("app")
    assert (controller.slo_of("org/small").ttft_s, controller.slo_of("b").ttft_s) == (1.0, 9.0)


def test_one_model_needs_no_list() -> None:
    (config,) = parse_models({"model": {"path": "a"}})
    assert config == parse_config({"model": {"path": "a"}})
    assert engine_deployments([config.model.served_name]) == ["EngineReplica"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "models is"),
        ({"a": {}}, "models is"),
        ([{"model": {"path": "a"}}, {"model": {"path": "a"}}], "names a, a; allowed: different ones"),
        ([{"model": {"path": "a"}, "ingress": {}}], "models[0] has ingress; allowed: beside models"),
        ([{"model": {"path": "a"}, "replicas": 0}], "models[0]: replicas is 0"),
        ([{}], "models[0]: model is missing"),
    ],
)
def test_mistakes_in_models_are_named(models: object, message: str) -> None:
    with pytest.raises(ClusterConfigError, match=re.escape(message)):
        parse_models({"models": models})
