"""``brownoutserve unite``: build united experts of a model from calibration text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.progress import TimeRemainingColumn
from rich.table import Table

from cluster.commands.common import console, one_sentence, text_option, work_bar

if TYPE_CHECKING:
    from engine.unite.build import Job, Progress


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@text_option("Calibration text like what will be served:")
@click.option(
    "--way", "ways", type=click.Choice(["2", "4", "8"]), multiple=True, default=["4"], show_default=True,
    help="Members of a united expert. May be given several times: all are built in one pass.",
)  # fmt: skip
@click.option(
    "--method", default="routed", show_default=True,
    help="routed: distilled on the inputs that the router sends (minutes on a GPU). instant: no training (seconds). "
    "mixture, frequency, average: the literature's builds, for comparison only.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Parent of the directories united-WAY; default: MODEL.")
@click.option("--sequences", default=128, show_default=True, help="Calibration sequences; at least 64 are needed.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens of each, at most the model's context.")
@click.option("--grouping", "groupings", multiple=True, help="consecutive, apart, similar; default: the best of all.")
@click.option("--exempt-first", default=2, show_default=True, help="First layers that get no united experts.")
@click.option("--exempt-last", default=2, show_default=True, help="Last layers that get none.")
@click.option(
    "--max-error", default=0.6, show_default=True, help="Held-out routed error above which a group is not used."
)
@click.option("--steps", default=400, show_default=True, help="Distillation steps per layer and way.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def unite(
    model: Path,
    texts: tuple[Path, ...],
    ways: tuple[str, ...],
    method: str,
    out: Path | None,
    sequences: int,
    tokens: int,
    groupings: tuple[str, ...],
    exempt_first: int,
    exempt_last: int,
    max_error: float,
    steps: int,
    device: str,
) -> None:
    """Build united experts: experts that stand in for several while the model is dimmed.

    MODEL is a Hugging Face directory. The result is a directory united-WAY for each way; name it under
    brownout.united in the Serve file. Interrupted, the same command goes on at the layer where it stopped.

    \b
    Example:
      brownoutserve unite models/qwen1.5-moe-a2.7b --text traffic.txt --way 2 --way 4
      brownoutserve calibrate ...      measures what dimming costs; without that, nothing is dimmed
    """
    with one_sentence():
        from engine.config import ModelConfig  # torch takes a second to import
        from engine.text.tokenizer import load_tokenizer
        from engine.unite.build import Job, UniteOptions
        from engine.unite.build import unite as build
        from engine.unite.calibration import cut_sequences, read_text
        from engine.unite.capture import load_for_calibration
        from engine.unite.distil import DistilOptions
        from engine.unite.groups import GROUPINGS
        from engine.weights.digest import model_digest

        jobs = [Job(int(way), method, (out or model) / f"united-{way}") for way in dict.fromkeys(ways)]
        options = UniteOptions(
            exempt_first=exempt_first,
            exempt_last=exempt_last,
            max_error=max_error,
            distil=DistilOptions(num_steps=steps),
            groupings=groupings or GROUPINGS,
        )
        with console.status("reading the model and the calibration text"):
            slot = load_for_calibration(ModelConfig(str(model)), tokens, device)
            encode = load_tokenizer(str(model)).encode
            calibration = cut_sequences(
                [read_text(path) for path in texts], encode, sequences, min(tokens, slot.max_model_len)
            )
            digest = model_digest(model)
        _show(jobs, lambda on_progress: build(slot, digest, calibration, jobs, options, on_progress))


def _show(jobs: list[Job], run: Callable[[Callable[[Progress], None]], None]) -> None:
    """Run a build with a progress bar, then say how good each artefact is."""
    errors: dict[Path, list[float]] = {}
    seconds: dict[Path, float] = {}
    refused: dict[Path, int] = {}
    with work_bar(TimeRemainingColumn()) as bar:
        task = bar.add_task("united experts", total=None)

        def on_progress(progress: Progress) -> None:
            directory = progress.job.directory
            errors.setdefault(directory, []).append(progress.error)
            seconds[directory] = seconds.get(directory, 0.0) + progress.seconds
            refused[directory] = refused.get(directory, 0) + progress.num_refused
            said = f"layer {progress.layer}, {progress.job.way}-way, {progress.grouping}: error {progress.error:.3f}"
            bar.update(task, completed=progress.num_done, total=progress.num_total, description=said)

        run(on_progress)
    table = Table("directory", "way", "layers built", "held-out routed error", "groups not used", "seconds")
    for job in jobs:
        built = errors.get(job.directory, [])
        error = f"{sum(built) / len(built):.3f}" if built else "was complete"
        table.add_row(
            str(job.directory), str(job.way), str(len(built)), error, str(refused.get(job.directory, 0)),
            f"{seconds.get(job.directory, 0.0):.1f}",
        )  # fmt: skip
    console.print(table)
