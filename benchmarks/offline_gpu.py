"""Offline throughput of the engine on a GPU: all requests at once, KV limited only by memory, exact and fully dimmed.

Random weights of the model's real shapes, drawn on the card or from a checkpoint that a peer reads too, and random
prompts of the lengths in LENGTHS.json: {"work": [[prompt tokens, output tokens], ...], ...}. Greedy, prefix caching
off, detokenizing included. The figures go into h100_engine.json, a peer's beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

from benchmarks.engine_gpu import MAX_MODEL_LEN, MODEL, PREFILL_STEP_TOKENS
from benchmarks.results import RESULTS, markdown_table, update_result
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.models.registry import load_spec
from engine.types import BrownoutSetting, GenerationRequest, SamplingParams

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
MAX_NUM_SEQS = 512
WARM_UP_REQUESTS = 64
REPEATS = 2  # the better one counts, as for the peer
SEED = 0

Lengths = list[tuple[int, int]]


def load(exempt: int, checkpoint: Path | None, directory: Path) -> Engine:
    """The real shapes with the demo model's tokenizer: ids beyond its vocabulary become no text."""
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL.parent / "demo-random" / name, checkpoint or directory)
    if checkpoint is None:
        shutil.copy(MODEL / "config.json", directory)
    load_format = "random" if checkpoint is None else "safetensors"
    return Engine(
        EngineConfig(
            ModelConfig(str(checkpoint or directory), load_format=load_format, max_model_len=MAX_MODEL_LEN),
            cache=CacheConfig(prefix_caching=False),
            scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=PREFILL_STEP_TOKENS),
            brownout=BrownoutConfig(
                ways=(8,), exempt_first=exempt, exempt_last=exempt, allow_unmeasured=True, profile_repeats=0
            ),
        )
    )


def run(engine: Engine, lengths: Lengths, label: str) -> float:
    """Seconds to serve all requests; the prompts are drawn before, as the peer's are. The garbage collector ignores
    what is there already, as in a serving process (engine.async_engine)."""
    rng = random.Random(SEED)
    prompts = [tuple(rng.randrange(10, engine.info.vocab_size) for _ in range(num)) for num, _ in lengths]
    num_tokens = 0
    gc.collect()
    gc.freeze()
    start_s = time.perf_counter()
    for index, (prompt, (_, output_tokens)) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        engine.add(GenerationRequest(f"{label}-{index}", prompt, sampling))
    with Progress(transient=True) as progress:
        task = progress.add_task(label, total=sum(output for _, output in lengths))
        while engine.has_work:
            step_tokens = sum(len(output.token_ids) for output in engine.step())
            progress.advance(task, step_tokens)
            num_tokens += step_tokens
    elapsed_s = time.perf_counter() - start_s
    assert num_tokens == sum(output for _, output in lengths)
    return elapsed_s


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lengths", type=Path, metavar="LENGTHS.json")
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory with the model's weights")
    parser.add_argument("--peer", type=Path, help="what a peer's benchmark wrote, to keep beside our figures")
    parser.add_argument("--exempt", type=int, default=0, help="layers at each end that are never dimmed (default 0)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch

    works: dict[str, Lengths] = json.loads(arguments.lengths.read_text())
    figures: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        start_s = time.perf_counter()
        engine = load(arguments.exempt, arguments.checkpoint, Path(directory))
        ready_s = round(time.perf_counter() - start_s, 1)
        print(f"ready in {ready_s} s, {engine.info.num_blocks} KV blocks", flush=True)
        num_dimmed = load_spec(MODEL).num_layers - 2 * arguments.exempt
        for name, level in (("level0", 0), (f"way8_max{num_dimmed}", engine.info.num_levels - 1)):
            engine.apply_setting(BrownoutSetting.pinned(level))
            for work, lengths in works.items():
                run(engine, lengths[:WARM_UP_REQUESTS], f"{name} {work} warm-up")
                seconds = min(run(engine, lengths, f"{name} {work} {repeat}") for repeat in range(REPEATS))
                figures.setdefault(work, {})[name] = {
                    "req_s": round(len(lengths) / seconds, 2),
                    "out_tok_s": round(sum(output for _, output in lengths) / seconds),
                }
                print(work, name, figures[work][name], flush=True)
    result: dict[str, object] = {
        "card": torch.cuda.get_device_name(),
        "offline": figures,
        "offline_conditions": {
            "seed": SEED,
            "max_num_seqs": MAX_NUM_SEQS,
            "num_kv_blocks": engine.info.num_blocks,
            "ready_s": ready_s,
            "weights": "checkpoint" if arguments.checkpoint else "drawn on the card",
        },
    }
    if arguments.peer:
        result["peer"] = json.loads(arguments.peer.read_text())
    update_result(arguments.out / "h100_engine.json", result)
    rows = [(w, n, str(f["req_s"]), str(f["out_tok_s"])) for w, named in figures.items() for n, f in named.items()]
    print(markdown_table(("work", "setting", "requests/s", "output tokens/s"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
