"""What the engine's steps cost on a GPU: decode at each brownout setting and batch size, prefill, attention backends.

Random weights of the model's real shapes, drawn on the card. Times are of the step itself, without scheduling.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.gpu_profile import Row, active_experts, copy_bytes_s, decode_floors_us, profile
from benchmarks.results import RESULTS, markdown_table, update_result
from engine import graphs
from engine.attention.base import DecodeBackend
from engine.attention.select import create_attention
from engine.batch import AttentionMetadata, StepRows
from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.pool.slots import ModelSlot, load_slot
from engine.types import Levels

MODEL = Path(__file__).resolve().parents[1] / "deploy/models/qwen1.5-moe-a2.7b"
WAYS = (2, 4, 8)
BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256)
CONTEXT_TOKENS = 160
PREFILLS = ((16, 512), (64, 256), (64, 1024), (32, 2048))  # sequences, tokens each
PREFILL_STEP_TOKENS = 16384
MAX_MODEL_LEN = 4096
NUM_BLOCKS = 64 * 1024 // 16 + 1
PROFILED_BATCH = 64
ATTENTION_CONTEXTS = {
    "64x160": (160,) * 64,
    "64x1056": (1056,) * 64,
    "1x1056": (1056,),
    "63x160, 1x2560": (2560,) + (160,) * 63,  # the longest must not keep the others waiting
}
SEED = 0
REPLAYS = 10
SAMPLES = 5


def load(exempt: int, ways: tuple[int, ...]) -> ModelSlot:
    """The model on the card, with ``exempt`` layers at each end never dimmed."""
    slot = load_slot(
        EngineConfig(
            ModelConfig(str(MODEL), load_format="random", max_model_len=MAX_MODEL_LEN),
            cache=CacheConfig(num_blocks=NUM_BLOCKS),
            scheduler=SchedulerConfig(max_num_seqs=max(BATCH_SIZES), max_num_batched_tokens=PREFILL_STEP_TOKENS),
            brownout=BrownoutConfig(ways=ways, exempt_first=exempt, exempt_last=exempt, allow_unmeasured=True),
        )
    )
    torch.manual_seed(SEED)  # the same routing for every model measured
    slot.kv.keys.normal_()
    slot.kv.values.normal_()
    return slot


def deepest_settings(slot: ModelSlot) -> dict[str, int]:
    """Name |-> number of a setting: the exact one, and of each way the one that dims all it may."""
    num_dimmed = sum(layer.moe.dimmer is not None for layer in slot.model.layers)
    deepest = {f"way{x.way}_max{num_dimmed}": i for i, x in enumerate(slot.ladder.settings) if x.share == 1}
    return {"level0": 0} | deepest


def decode_rows(slot: ModelSlot, num_rows: int) -> StepRows:
    """Random tokens, each at the end of a context of its own."""
    token_ids = np.random.default_rng(num_rows).integers(slot.spec.vocab_size, size=num_rows)
    tables = own_blocks(0, num_rows, CONTEXT_TOKENS // slot.kv.block_size)
    return StepRows.decodes(token_ids, np.full(num_rows, CONTEXT_TOKENS - 1), tables)


def own_blocks(first: int, num_sequences: int, blocks_each: int) -> np.ndarray:
    """Block tables of the sequences from number ``first`` on, which share nothing."""
    return (1 + first * blocks_each + np.arange(num_sequences * blocks_each, dtype=np.int32)).reshape(num_sequences, -1)


def decode_step_ms(slot: ModelSlot, setting: int, num_rows: int) -> float:
    """Milliseconds of GPU time per graph replay, gaps between replays included."""
    assert slot.graphs is not None
    slot.graphs.launch(decode_rows(slot, num_rows), Levels(decode=setting))
    return time_ms(lambda: slot.graphs.replay_decode(num_rows))


def time_ms(launch: Callable[[], object]) -> float:
    """Median over SAMPLES of the mean of REPLAYS launches, by the GPU's clock."""
    launch()
    torch.cuda.synchronize()
    times = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return median(times)


@torch.inference_mode()
def prefill_tok_s(slot: ModelSlot, num_sequences: int, length: int) -> tuple[float, Callable[[], None]]:
    """Prompt tokens per second, in steps of whole sequences, host work included, best of three; and one such run."""
    assert slot.graphs is not None
    graphs, per_step = slot.graphs, max(1, PREFILL_STEP_TOKENS // length)
    prompts = np.random.default_rng(length).integers(slot.spec.vocab_size, size=(num_sequences, length))

    def run() -> None:
        steps = []
        for first in range(0, num_sequences, per_step):
            tokens = prompts[first : first + per_step]
            rows = StepRows.prompts(tokens, own_blocks(first, len(tokens), length // slot.kv.block_size), samples=True)
            steps.append(graphs.launch(rows, Levels()))
        steps[-1].token_ids()

    best_s = math.inf
    for _ in range(3):
        start_s = time.perf_counter()
        run()
        best_s = min(best_s, time.perf_counter() - start_s)
    return num_sequences * length / best_s, run


def decode_backends(block_size: int) -> Iterator[DecodeBackend]:
    """Every decode backend that runs here."""
    for name in ("auto", "flash_attn3", "flash_attn", "xformers"):
        try:
            yield create_attention(name, torch.device("cuda"), 128, torch.bfloat16, block_size).decode_backend
        except ConfigError as error:
            logging.warning("%s", error)


def attention_ms(contexts: tuple[int, ...], num_heads: int = 16, block_size: int = 256) -> dict[str, float]:
    """Milliseconds of one layer's decode attention, by backend; layers of KV in turn, so that none is in the cache."""
    num_sequences, device, width = len(contexts), torch.device("cuda"), -(-max(contexts) // block_size)
    pools = torch.randn(8, 2, num_sequences * width, block_size, num_heads, 128, device=device, dtype=torch.bfloat16)
    queries = torch.randn(num_sequences, num_heads, 128, device=device, dtype=torch.bfloat16)
    metadata = AttentionMetadata(
        num_decodes=num_sequences,
        query_lens=(1,) * num_sequences,
        context_lens=contexts,
        prefill_starts_dev=torch.zeros(1, dtype=torch.int32, device=device),
        context_lens_dev=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table=torch.arange(num_sequences * width, dtype=torch.int32, device=device).view(num_sequences, width),
        slot_mapping=torch.zeros(num_sequences, dtype=torch.int64, device=device),
    )
    times = {}
    for backend in decode_backends(block_size):

        def run(backend: DecodeBackend = backend) -> None:
            backend.begin_step(metadata, num_heads)
            rows = queries.clone()  # in a step, too, other kernels lie between
            for keys, values in pools:
                backend.decode(rows, keys, values, metadata)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times[backend.name] = time_ms(graph.replay) / len(pools)
    return times


def measure_decode(slot: ModelSlot) -> Iterator[tuple[str, dict[str, float], float]]:
    """Setting's name, its step time in ms by batch size, and the active experts of a layer at PROFILED_BATCH."""
    for name, setting in deepest_settings(slot).items():
        active = active_experts(slot, decode_rows(slot, PROFILED_BATCH), setting)
        yield name, {str(b): round(decode_step_ms(slot, setting, b), 3) for b in BATCH_SIZES}, sum(active) / len(active)


def measure_profiles(slot: ModelSlot, bytes_s: float) -> Iterator[tuple[str, list[Row]]]:
    """Profiles of decode steps, undimmed and dimmed, and of one prefill step."""
    assert slot.graphs is not None
    settings = deepest_settings(slot)
    for name, batch in (("level0", 1), ("level0", PROFILED_BATCH), (max(settings, key=settings.get), PROFILED_BATCH)):
        rows = decode_rows(slot, batch)
        floors_us = decode_floors_us(slot, rows, sum(active_experts(slot, rows, settings[name])), bytes_s)
        slot.graphs.launch(rows, Levels(decode=settings[name]))
        yield f"{name} batch {batch}", profile(lambda batch=batch: slot.graphs.replay_decode(batch), 1, floors_us)
    _, prefill = prefill_tok_s(slot, 8, 1024)
    yield "prefill 8x1024", profile(prefill, 1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_gpu", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one model only: all layers may be dimmed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    card = torch.cuda.get_device_name()
    bytes_s = copy_bytes_s()
    figures: dict[str, object] = {"card": card, "copy_tb_s": round(bytes_s / 1e12, 3)}
    decode: dict[str, dict[str, float]] = {}
    active: dict[str, float] = {}
    profiles: dict[str, list[Row]] = {}
    graphs.DECODE_SIZES, graphs.ROW_SIZES = BATCH_SIZES, graphs.ROW_SIZES[:1]  # no others are measured
    models = ((0, WAYS, ""),) if arguments.quick else ((0, (), "_without_united"), (2, WAYS, ""), (0, WAYS, ""))
    for exempt, ways, suffix in models:
        started_s = time.perf_counter()
        slot = load(exempt, ways)
        print(f"exempt {exempt}, ways {ways}: loaded in {time.perf_counter() - started_s:.1f} s", flush=True)
        for name, times, num_active in measure_decode(slot):
            decode[name + suffix], active[name + suffix] = times, round(num_active, 1)
            print(name + suffix, times, f"{num_active:.1f} active experts at {PROFILED_BATCH}", flush=True)
        if exempt == 0 and ways:
            profiles = dict(measure_profiles(slot, bytes_s))
            tok_s = {f"{n}x{length}": round(prefill_tok_s(slot, n, length)[0]) for n, length in PREFILLS}
            figures["prefill_tok_s"] = tok_s
            print(tok_s, flush=True)
        del slot
        torch.cuda.empty_cache()
    figures["decode_step_ms"] = decode
    figures[f"active_experts_at_{PROFILED_BATCH}"] = active
    figures["attention_ms"] = {name: attention_ms(contexts) for name, contexts in ATTENTION_CONTEXTS.items()}
    print(figures["attention_ms"], flush=True)
    update_result(arguments.out / "h100_engine.json", figures)
    note = "us: from the latest earlier end of a kernel to this one's; they add up to the step"
    steps = {"card": card, "copy_tb_s": figures["copy_tb_s"], "note": note, **profiles}
    (arguments.out / "h100_step_profile.json").write_text(json.dumps(steps, indent=1) + "\n")
    print(
        markdown_table(("setting", *map(str, BATCH_SIZES)), [(n, *map(str, row.values())) for n, row in decode.items()])
    )
    columns = ("kernel", "launches", "us", "floor_us", "floor_frac")
    for name, rows in profiles.items():
        print(f"{name}: {sum(float(row['us']) for row in rows):.0f} us")
        print(markdown_table(columns, [tuple(str(row.get(column, "")) for column in columns) for row in rows[:18]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
