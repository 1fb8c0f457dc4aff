"""``brownoutserve config``: look at configuration files."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.commands.common import console, one_sentence


@click.group()
def config() -> None:
    """Look at configuration files."""


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def config_check(file: Path) -> None:
    """Check a Serve YAML file: Ray's part and ours. Exit code 2 and one sentence if something is wrong."""
    with one_sentence():
        from cluster.serve_file import load_serve_file  # Ray takes a second to import

        checked = load_serve_file(file)
    for config in checked.configs:
        replicas = "1 replica" if config.replicas == 1 else f"{config.replicas} replicas"
        console.print(f"{file}: {config.model.served_name} on {replicas}, law {config.controller.law}", soft_wrap=True)
