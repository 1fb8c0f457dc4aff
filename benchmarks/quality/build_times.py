"""How long united experts and a ladder take for a 14B model: random weights in Qwen1.5-MoE-A2.7B's shapes, one GPU.

    python -m benchmarks.quality.build_times --model deploy/models/qwen1.5-moe-a2.7b

Times are of whole runs: a build from capture to manifest, as `brownoutserve unite` takes it, the model's loading told
apart; a ladder from loading the model to ladder.json, as `brownoutserve calibrate` takes it with its defaults.
Random experts have nothing in common, so the errors say nothing. Random tokens stand for text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import RESULTS, markdown_table, result_file, write_result
from engine.calibrate.calibrate import CalibrateOptions, Calibration
from engine.config import ModelConfig
from engine.moe.dimming import dimming_digest
from engine.pool.slots import ModelSlot
from engine.unite.build import Job, UniteOptions, unite
from engine.unite.capture import load_for_calibration
from engine.unite.distil import DistilOptions

LADDER_SEQUENCES, LADDER_TOKENS = 128, 128


def random_text(vocab_size: int, num_sequences: int, num_tokens: int, seed: int) -> torch.Tensor:
    """[S, T]"""
    return torch.randint(vocab_size, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(seed))


def timed_build(slot: ModelSlot, model: ModelConfig, job: Job, options: argparse.Namespace) -> float:
    """Seconds of one build of all layers from capture to manifest."""
    sequences = random_text(slot.spec.vocab_size, options.sequences, options.tokens, options.seed)
    exempt = options.exempt
    build = UniteOptions(
        exempt_first=exempt, exempt_last=exempt, max_error=100.0, distil=DistilOptions(num_steps=options.steps)
    )
    started_s = time.perf_counter()
    unite(slot, dimming_digest(model), sequences, [job], build)
    return time.perf_counter() - started_s


def timed_ladder(model: ModelConfig, vocab_size: int, united: Path, options: argparse.Namespace) -> float:
    """Seconds of a calibration of all dimmers with one way of united experts."""
    text = random_text(vocab_size, LADDER_SEQUENCES, LADDER_TOKENS, options.seed + 1)
    calibrate = CalibrateOptions(
        united=(str(united),), exempt_first=options.exempt, exempt_last=options.exempt, max_loss=100.0,
        device=options.device,
    )  # fmt: skip
    started_s = time.perf_counter()
    Calibration(model, text, united.parent, calibrate).run()
    return time.perf_counter() - started_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--ways", nargs="+", type=int, default=[4], help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", default=["instant", "routed"], help="default: %(default)s")
    parser.add_argument("--sequences", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=2048, help="per sequence; default: %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of distillation; default: %(default)s")
    parser.add_argument("--exempt", type=int, default=2, help="layers at each end; default: %(default)s")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=result_file, default=RESULTS / "build_times.json", help="default: %(default)s")
    options = parser.parse_args()
    started_s = time.perf_counter()
    model = ModelConfig(str(options.model), load_format="random", seed=options.seed)
    slot = load_for_calibration(model, options.tokens, options.device)
    figures: dict[str, object] = {
        "device": torch.cuda.get_device_name() if slot.device.type == "cuda" else "CPU",
        "model": options.model.name,
        "seed": options.seed,
        "loading_s": round(time.perf_counter() - started_s, 1),
    }
    vocab_size = slot.spec.vocab_size
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        jobs = [Job(way, name, Path(directory) / f"{name}-{way}") for way in options.ways for name in options.methods]
        for job in jobs:
            seconds = round(timed_build(slot, model, job, options), 1)
            rows.append({"method": job.method, "way": job.way, "seconds": seconds})
            print(f"{job.method} {job.way}-way: {seconds} s", flush=True)
        del slot
        torch.cuda.empty_cache()
        figures["ladder_s"] = round(timed_ladder(model, vocab_size, jobs[0].directory, options), 1)
        print(f"ladder: {figures['ladder_s']} s", flush=True)
    write_result(options.out, {**figures, "builds": rows})
    print(markdown_table(["method", "way", "seconds"], [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
