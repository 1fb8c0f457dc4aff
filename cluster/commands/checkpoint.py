"""``brownoutserve checkpoint``: look at checkpoints, and make random ones."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from cluster.commands.common import console, one_sentence

MAX_SEED = (1 << 32) - 1


@click.group()
def checkpoint() -> None:
    """Look at Hugging Face checkpoints, and make random ones."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress, where there is no terminal


@checkpoint.command("random")
@click.argument("config_dir", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--shard-gib", type=click.FloatRange(min=0, min_open=True), default=4.0, show_default=True)
def checkpoint_random(config_dir: Path, out: Path, dtype: str, seed: int, device: str, shard_gib: float) -> None:
    """Write a checkpoint with random weights for the config.json in CONFIG_DIR to the new directory OUT.

    OUT is an ordinary Hugging Face directory: sharded safetensors with an index, config.json, and the tokenizer's files
    if CONFIG_DIR has them; transformers and vLLM load it too. Weights are drawn with Hugging Face's standard deviation
    of 0.02, norms are 1, biases 0. The same seed gives the same weights on the same kind of device.

    \b
    brownoutserve checkpoint random deploy/models/qwen1.5-moe-a2.7b /tmp/qwen --seed 0
    """
    with one_sentence():
        import torch  # takes a second to import

        from engine.pool.slots import resolve_device
        from engine.weights.writer import write_random_checkpoint

        files = write_random_checkpoint(
            config_dir, out, getattr(torch, dtype), seed, resolve_device(device), int(shard_gib * (1 << 30))
        )
    total_gib = sum(file.stat().st_size for file in files) / (1 << 30)
    console.print(f"{out}: {total_gib:.2f} GiB of {dtype} in {len(files)} files", soft_wrap=True)


@checkpoint.command("check")
@click.argument("directory", type=click.Path(path_type=Path))
def checkpoint_check(directory: Path) -> None:
    """Check that DIRECTORY can be served: its config, and the names, shapes and types of its tensors.

    Reads headers only. Exit code 2 for a config that cannot be served, 1 for files that do not fit it.
    """
    with one_sentence():
        from engine.models.layout import checkpoint_tensors
        from engine.models.registry import load_spec
        from engine.weights.safetensors import SafetensorsCheckpoint

        spec = load_spec(directory)
        tensors = checkpoint_tensors(spec)
        SafetensorsCheckpoint(directory, spec.fp8_block).check(tensors, spec.tie_word_embeddings)
    num_parameters = sum(tensor.num_elements for tensor in tensors)
    console.print(
        f"{directory}: {spec.architecture}, {_in_words(num_parameters)} parameters in {len(tensors)} tensors, "
        f"{len(spec.moe_layers)} of {spec.num_layers} layers with routed experts",
        soft_wrap=True,
    )


def _in_words(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"
