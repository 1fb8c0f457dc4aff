"""``brownoutserve united``: look at united experts, and swap them while serving."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from cluster.commands.common import console, fail, one_sentence, target_options

TIMEOUT_S = 1800.0  # a large model's experts are read from disk, once to check and once to load


@click.group()
def united() -> None:
    """United experts: experts that stand in for several while the model is dimmed (see brownoutserve unite)."""


@united.command("show")
@click.argument("path", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--weights/--no-weights", default=True, show_default=True, help="Also read and check the weights.")
def united_show(path: Path, weights: bool) -> None:
    """Say what PATH holds, how good it is, and whether it is intact."""
    with one_sentence():
        from engine.moe.united import UnitedArtefact  # torch takes a second to import

        artefact = UnitedArtefact(path)
        if weights:
            with console.status("reading the weights"):
                artefact.check_weights()
    manifest = artefact.manifest
    console.print(
        f"{manifest.way}-way, method {manifest.method}, for the model {manifest.model_digest[:12]}, "
        f"build {manifest.digest[:12]}; {len(manifest.protect)} protected experts"
    )
    table = Table("layer", "united experts", "mean held-out error", "not used")
    for layer, stored in manifest.layers.items():
        errors = [error for error in stored.held_out_error if error is not None]
        mean = f"{sum(errors) / len(errors):.3f}" if errors else "-"
        table.add_row(str(layer), str(len(stored.groups)), mean, str(sum(stored.do_not_use)))
    console.print(table)


@united.command("swap")
@click.argument("path")
@click.option(
    "--ladder", default="", help="Ladder to use from then on; default: PATH/ladder.json, else the one in use."
)
@click.option(
    "--replaces", type=click.Choice(["2", "4", "8"]),
    help="Way that gives up its place to PATH; a build of the same way always replaces the one in use.",
)  # fmt: skip
@click.option("--model", help="The model that PATH belongs to, where several are served.")
@target_options
def united_swap(path: str, ladder: str, replaces: str | None, model: str | None, address: str | None, app: str) -> None:
    """Put the united experts of PATH in place on every replica, while serving.

    PATH is a directory on every replica's node. Each replica checks it as a whole first, and refuses it with everything
    as it was if it does not fit. Then the layers are replaced one by one between steps: no request is dropped, and
    undimmed answers stay exact throughout.
    """
    with one_sentence():
        from cluster.driver import connect, engine_handles, find_cluster

        connect(find_cluster(address))
        here = Path(path)
        given = str(here.resolve()) if here.exists() else path
        handles = engine_handles(app, model)
        if len(handles) > 1:
            fail(f"application {app!r} serves several models; name one with --model", 2)
        with console.status("checking and swapping, layer by layer"):
            answers = [
                report
                for handle in handles
                for report in handle.broadcast(
                    "swap_united",
                    given,
                    str(Path(ladder).resolve()) if ladder else "",
                    int(replaces) if replaces else None,
                ).results(timeout_s=TIMEOUT_S)
            ]
    for report in answers:
        console.print(f"{report.replica_id}: {report.error or 'in place'}")
    if not answers:
        fail(f"application {app!r} has no replica", 1)
    if refused := [report for report in answers if report.error]:
        fail(f"{len(refused)} of {len(answers)} replicas refused", 1)
