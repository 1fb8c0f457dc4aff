"""The command line: mistakes end with one sentence and their exit code, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.local.cluster import LocalCluster
from cluster.local.processes import MARK, marked_pids
from tests.e2e.conftest import MODEL
from tests.models import PROJECT_ROOT, write_config
from tests.united import change_manifest, write_united
from tests.waiting import until

TEST_MARK = "BROWNOUTSERVE_TEST"


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment of everything the test starts; nothing with it may be left."""
    value = uuid.uuid4().hex
    yield value
    until(lambda: not marked_pids(value, TEST_MARK))


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *args]


def environment(mark: str) -> dict[str, str]:
    """As in another shell: nothing of what this process has set for Ray."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != MARK}
    return {**inherited, TEST_MARK: mark, "PYTHONPATH": str(PROJECT_ROOT), "COLUMNS": "200"}


def run(mark: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), env=environment(mark), capture_output=True, text=True, timeout=300)


def write_yaml(path: Path, document: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_help_and_version(mark: str) -> None:
    shown = run(mark, "--help")
    assert shown.returncode == 0
    for word in ("serve", "status", "brownout", "config", "curl"):
        assert word in shown.stdout
    assert run(mark, "--version").stdout.startswith("brownoutserve, version")


def test_config_check(mark: str, tmp_path: Path, serve_document: Callable[..., dict[str, Any]]) -> None:
    good = run(mark, "config", "check", write_yaml(tmp_path / "good.yaml", serve_document()))
    assert (good.returncode, good.stderr) == (0, "")
    bad = run(mark, "config", "check", write_yaml(tmp_path / "bad.yaml", serve_document(replicas=0)))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"brownoutserve: {tmp_path}/bad.yaml: replicas is 0; allowed: greater than or equal to 1\n"


def assert_one_sentence(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("brownoutserve: "), result.stderr
    for word in words:
        assert word in result.stderr


def test_serve_refuses_a_bad_file(mark: str, tmp_path: Path, serve_document: Callable[..., dict[str, Any]]) -> None:
    path = write_yaml(tmp_path / "bad.yaml", serve_document(device="tpu"))
    assert_one_sentence(run(mark, "serve", path), 2, "device is 'tpu'", "auto, cpu, cuda")


def test_serve_refuses_a_busy_port(mark: str, tmp_path: Path, serve_document: Callable[..., dict[str, Any]]) -> None:
    path = write_yaml(tmp_path / "serve.yaml", serve_document())
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        assert_one_sentence(run(mark, "serve", path, "--port", port), 1, f"port {port}", "in use")


def test_serve_refuses_missing_and_corrupt_weights(
    mark: str, tmp_path: Path, serve_document: Callable[..., dict[str, Any]]
) -> None:
    path = write_yaml(tmp_path / "serve.yaml", serve_document(model={"path": str(tmp_path / MODEL)}))
    assert_one_sentence(run(mark, "serve", path), 2, "model.path", str(tmp_path / MODEL))
    weights = write_config(tmp_path / MODEL) / "model.safetensors"
    assert_one_sentence(run(mark, "serve", path), 1, str(weights), "missing")
    weights.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 not a header")
    assert_one_sentence(run(mark, "serve", path), 1, str(weights), "not a valid safetensors file")


@pytest.mark.cluster
def test_steering_a_running_cluster(mark: str, cluster: LocalCluster) -> None:
    """From another shell, with the cluster found by its address."""
    address = ["--address", cluster.gcs_address]
    try:
        pinned = run(mark, "brownout", *address, "set", "1")
        assert (pinned.returncode, pinned.stdout) == (0, f"{MODEL}: policy static, level 1\n"), pinned.stderr
        status = run(mark, "status", *address)
        assert status.returncode == 0, status.stderr
        assert "policy static, level 1" in status.stdout and MODEL in status.stdout
        assert_one_sentence(run(mark, "brownout", *address, "set", "99"), 2, "level is 99", "0 to")
        assert_one_sentence(run(mark, "brownout", *address, "law", "fuzzy"), 2, "'fuzzy'", "predictive")
        assert_one_sentence(run(mark, "brownout", *address, "--model", "other", "off"), 2, "'other'", MODEL)
    finally:
        cluster.controller.set_policy("off")


@pytest.mark.cluster
def test_explaining_a_request_and_a_time_range(mark: str, cluster: LocalCluster) -> None:
    address = ["--address", cluster.gcs_address]
    cluster.controller.set_policy("static", 1)
    try:
        cluster.controller.wait_applied(MODEL)
        body = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        headers = {"x-request-id": f"explain-{mark}"}
        assert httpx.post(f"{cluster.url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    finally:
        cluster.controller.set_policy("off")
    told = run(mark, "explain", *address, f"explain-{mark}")
    assert told.returncode == 0, told.stderr
    for words in ("class standard", "first token after", "pinned at 1", "operator", "pinned"):
        assert words in told.stdout
    shown = run(mark, "explain", *address, "--json", f"explain-{mark}")
    report = json.loads(shown.stdout)
    (request,) = report["requests"]
    assert (request["level_peak"], request["completion_tokens"]) == (1, 4)
    assert request["first_setting_version"] <= report["decisions"][0]["version"] <= request["last_setting_version"]
    ranged = run(mark, "explain", *address, "1h")
    assert ranged.returncode == 0, ranged.stderr
    assert "requests ended" in ranged.stdout and "operator" in ranged.stdout
    assert "level 0 to 1 under setting" in ranged.stdout
    assert_one_sentence(run(mark, "explain", *address, "nobody"), 1, "'nobody'", "10m")


@pytest.mark.cluster
def test_rays_own_commands_just_work(mark: str, cluster: LocalCluster, tmp_path: Path) -> None:
    """`serve status` and `serve deploy` in a shell that knows nothing of the cluster but its dashboard."""
    serve = [sys.executable, "-m", "ray.serve.scripts"]
    status = subprocess.run(
        [*serve, "status", "-a", cluster.dashboard_url],
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert status.returncode == 0, status.stderr
    assert yaml.safe_load(status.stdout)["applications"]["brownoutserve"]["status"] == "RUNNING"
    path = write_yaml(tmp_path / "same.yaml", cluster.file.document)
    deploy = subprocess.run(
        [*serve, "deploy", "-a", cluster.dashboard_url, path],
        env=environment(mark),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert deploy.returncode == 0, deploy.stderr
    cluster.wait_ready()


@pytest.mark.cluster
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_serve_ends_with_everything_it_started(
    mark: str, tmp_path: Path, serve_document: Callable[..., dict[str, Any]], ending: signal.Signals
) -> None:
    document = serve_document(replicas=1)
    url = f"http://127.0.0.1:{document['http_options']['port']}"
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command("serve", write_yaml(tmp_path / "serve.yaml", document)),
            # As where a proxy leads to the world outside.
            env={**environment(mark), "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            until(lambda: process.poll() is not None or f"is served at {url}" in log.read_text(), timeout_s=300)
            assert process.poll() is None, log.read_text()
            assert httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"] == MODEL
            assert len(marked_pids(mark, TEST_MARK)) > 5
        finally:
            process.send_signal(ending)
            process.wait(240)
    until(lambda: not marked_pids(mark, TEST_MARK))
    assert process.returncode == (0 if ending is signal.SIGINT else -signal.SIGKILL)


@pytest.mark.cluster
def test_united_experts_are_swapped_on_every_replica(
    mark: str, cluster: LocalCluster, tmp_path: Path, serve_document: Callable[..., dict[str, Any]]
) -> None:
    model = Path(serve_document()["applications"][0]["args"]["model"]["path"])
    build = write_united(tmp_path / "united-2", model, 2, random_seed=0)
    address = ("--address", cluster.gcs_address)
    before = httpx.post(f"{cluster.url}/v1/completions", json=COMPLETION, timeout=60).json()["choices"]
    swapped = run(mark, "united", "swap", str(build), *address)
    assert (swapped.returncode, swapped.stderr) == (0, "")
    assert swapped.stdout.count("in place") == 2
    assert httpx.post(f"{cluster.url}/v1/completions", json=COMPLETION, timeout=60).json()["choices"] == before
    change_manifest(build, model_digest="0" * 64)
    refused = run(mark, "united", "swap", str(build), *address)
    assert refused.returncode == 1
    assert refused.stdout.count("were built for the model 000000000000") == 2
    assert refused.stderr == "brownoutserve: 2 of 2 replicas refused\n"


COMPLETION = {"model": MODEL, "prompt": "The lamp burns", "max_tokens": 8, "temperature": 0}
