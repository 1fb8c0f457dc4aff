"""``brownoutserve serve``: a cluster on this machine, from its start to Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import click

from cluster.commands.common import console, one_sentence
from cluster.config import PROJECT_ROOT

DEFAULT_FILE = PROJECT_ROOT / "deploy/serve/demo.yaml"
WATCH_PERIOD_S = 1.0


@click.command()
@click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_FILE, required=False)
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port; default: the file's.")
def serve(config: Path, port: int | None) -> None:
    """Start a cluster on this machine and keep it until Ctrl-C.

    CONFIG is a Serve YAML file (default: deploy/serve/demo.yaml, a small model on the CPU). Starts Ray, a
    private Redis (unless REDIS_URL is set), the controller, the ingress and the replicas, all on 127.0.0.1, and ends
    all of them with itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    with one_sentence():
        from cluster.local.cluster import LocalCluster  # Ray takes a second to import
        from cluster.local.ray_head import DASHBOARD_PORT

        with console.status("starting Ray, Redis, the controller, the ingress and the replicas"):
            cluster = LocalCluster.start(config, port)
        with cluster:
            first = cluster.file.config
            wants_keys = first.admission is not None and first.admission.wants_keys
            models = [config.model.served_name for config in cluster.file.configs]
            console.print(_welcome(cluster.url, models, wants_keys), soft_wrap=True)  # there to be copied from
            console.print(f"logs in {cluster.logs_path}, dashboard at {cluster.dashboard_url}", soft_wrap=True)
            if urlsplit(cluster.dashboard_url).port != DASHBOARD_PORT:
                console.print(f"for Ray's own commands: export RAY_DASHBOARD_ADDRESS={cluster.dashboard_url}")
            try:
                while True:
                    time.sleep(WATCH_PERIOD_S)
                    cluster.check()
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
                console.print("stopping")


def _welcome(url: str, models: Sequence[str], wants_keys: bool) -> str:
    key = " -H 'authorization: Bearer KEY'" if wants_keys else ""
    verb = "is" if len(models) == 1 else "are"
    return (
        f"[bold]{', '.join(models)}[/bold] {verb} served at [bold]{url}[/bold]; Ctrl-C ends it\n"
        f"""  curl {url}/v1/completions -H 'content-type: application/json'{key} \\\n"""
        f"""    -d '{{"model": "{models[0]}", "prompt": "Hello", "max_tokens": 16}}'"""
    )
