"""``brownoutserve calibrate``: measure what dimming costs and saves, and write the model's ladder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cluster.commands.common import console, one_sentence, text_option, work_bar

if TYPE_CHECKING:
    from engine.calibrate.calibrate import Calibration, Progress
    from engine.moe.ladder import Ladder


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, file_okay=False))
@text_option("Held-out text like what will be served, not the one that united experts were built on:")
@click.option(
    "--united", multiple=True,
    help="Directory of united experts, as in brownout.united. May be given several times; default: MODEL/united-*.",
)  # fmt: skip
@click.option(
    "--dimmer", "dimmers", multiple=True, default=["united", "piggyback", "topk"], show_default=True,
    help="Which dimmers to try: united, piggyback, topk; paper and similar are baselines of the literature.",
)  # fmt: skip
@click.option("--similarity", default="", help="File of expert similarities, for --dimmer similar.")
@click.option("--decode", "decode", multiple=True, type=int, default=[8, 32, 128], show_default=True,
              help="Sizes of decode steps to measure, in sequences.")  # fmt: skip
@click.option("--prefill", "prefill", multiple=True, type=int, default=[2048], show_default=True,
              help="Sizes of prefill steps to measure, in tokens.")  # fmt: skip
@click.option(
    "--sequences", default=128, show_default=True, help="Text windows; at least 64, and the largest --decode."
)
@click.option("--tokens", default=128, show_default=True, help="Tokens of each.")
@click.option("--levels", default=10, show_default=True, help="Levels of the ladder, level 0 included.")
@click.option("--max-loss", default=0.3, show_default=True, help="The strongest level's loss, nats per token.")
@click.option("--repeats", default=5, show_default=True, help="Steps timed for each setting.")
@click.option("--exempt-first", default=2, show_default=True, help="First layers that are never dimmed, as served.")
@click.option("--exempt-last", default=2, show_default=True, help="Last layers that are never dimmed.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the results go; default: MODEL.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def calibrate(
    model: Path,
    texts: tuple[Path, ...],
    united: tuple[str, ...],
    dimmers: tuple[str, ...],
    similarity: str,
    decode: tuple[int, ...],
    prefill: tuple[int, ...],
    sequences: int,
    tokens: int,
    levels: int,
    max_loss: float,
    repeats: int,
    exempt_first: int,
    exempt_last: int,
    out: Path | None,
    device: str,
) -> None:
    """Measure what dimming costs in quality and saves in time, and write the model's ladder.

    MODEL is a Hugging Face directory. Without a ladder beside it, a model is never dimmed. Writes ladder.json (the
    levels), quality_profile.json (all that was measured) and ladder.png. Interrupted, the same command goes on where
    it stopped. Run it on the card that will serve: step times differ.

    \b
    Example:
      brownoutserve unite models/qwen1.5-moe-a2.7b --text traffic.txt --way 2 --way 4
      brownoutserve calibrate models/qwen1.5-moe-a2.7b --text traffic_heldout.txt
    """
    with one_sentence():
        from engine.calibrate.calibrate import CalibrateOptions, Calibration  # torch takes a second to import
        from engine.config import ModelConfig, require
        from engine.moe.settings import DimmerKind
        from engine.text.tokenizer import load_tokenizer
        from engine.unite.calibration import cut_sequences, read_text

        known = {kind.name.lower(): kind for kind in DimmerKind if kind is not DimmerKind.EXACT}
        for name in dimmers:
            require(name in known, "--dimmer", name, ", ".join(known))
        options = CalibrateOptions(
            united=united or tuple(str(path.resolve()) for path in sorted(model.glob("united-*")) if path.is_dir()),
            similarity=similarity,
            decode_sizes=decode,
            prefill_sizes=prefill,
            kinds=tuple(known[name] for name in dict.fromkeys(dimmers)),
            exempt_first=exempt_first,
            exempt_last=exempt_last,
            num_levels=levels,
            max_loss=max_loss,
            repeats=repeats,
            device=device,
        )
        with console.status("reading the text"):
            encode = load_tokenizer(str(model)).encode
            windows = cut_sequences([read_text(path) for path in texts], encode, sequences, tokens)
        details = {"text": [path.name for path in texts], "command": shlex.join(["brownoutserve", *sys.argv[1:]])}
        _run(Calibration(ModelConfig(str(model)), windows, out or model, options, details))


def _run(calibration: Calibration) -> None:
    from engine.calibrate.candidates import step_sizes
    from engine.calibrate.plot import plot_fronts
    from engine.calibrate.profile import PROFILE_FILE, read_profile

    with work_bar() as bar:
        task = bar.add_task("loading the model", total=None)

        def on_progress(progress: Progress) -> None:
            bar.update(task, completed=progress.num_done, total=progress.num_total, description=progress.said)

        calibration.on_progress = on_progress
        ladder = calibration.run()
    _show(ladder)
    sizes = step_sizes(calibration.options.decode_sizes, calibration.options.prefill_sizes)
    try:
        picture = calibration.directory / "ladder.png"
        plot_fronts(read_profile(calibration.directory / PROFILE_FILE), sizes, ladder.buckets, picture)
        console.print(f"wrote ladder.json, {PROFILE_FILE} and ladder.png in {calibration.directory}")
    except ImportError:
        console.print(f"wrote ladder.json and {PROFILE_FILE} in {calibration.directory}; no picture without matplotlib")


def _show(ladder: Ladder) -> None:
    table = Table("level", *(bucket.name for bucket in ladder.buckets), title="loss in nats, share of the step time")
    for index in range(len(ladder)):
        levels = [bucket.levels[index] for bucket in ladder.buckets]
        table.add_row(str(index), *(f"{x.name}\n{x.loss:.4f}, {x.step_frac:.2f}" for x in levels))
    console.print(table)
