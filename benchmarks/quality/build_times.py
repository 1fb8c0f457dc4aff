"""How long united experts take to build for a 14B model: random weights in the shapes of Qwen1.5-MoE-A2.7B, one GPU.

    python -m benchmarks.quality.build_times --model deploy/models/qwen1.5-moe-a2.7b

Times are of whole runs, capture included, as `brownoutserve unite` takes them; the model's loading is told apart.
Random experts have nothing in common, so the errors say nothing. Random tokens stand for text.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.results import RESULTS, markdown_table, write_result
from engine.config import ModelConfig
from engine.pool.slots import ModelSlot
from engine.unite.build import Job, UniteOptions, unite
from engine.unite.capture import load_for_calibration
from engine.unite.distil import DistilOptions


def timed_build(slot: ModelSlot, method: str, way: int, options: argparse.Namespace, out: Path) -> dict[str, object]:
    """Seconds of one build of all layers from capture to manifest."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.sequences, options.tokens)
    sequences = torch.randint(slot.spec.vocab_size, shape, generator=generator)
    exempt = options.exempt
    build = UniteOptions(
        exempt_first=exempt, exempt_last=exempt, max_error=100.0, distil=DistilOptions(num_steps=options.steps)
    )
    directory = out / f"{method}-{way}"
    started_s = time.perf_counter()
    unite(slot, "random weights", sequences, [Job(way, method, directory)], build)
    seconds = time.perf_counter() - started_s
    shutil.rmtree(directory)
    return {"method": method, "way": way, "seconds": round(seconds, 1)}


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
    parser.add_argument("--out", type=Path, default=RESULTS / "build_times.json", help="default: %(default)s")
    options = parser.parse_args()
    started_s = time.perf_counter()
    slot = load_for_calibration(
        ModelConfig(str(options.model), load_format="random", seed=options.seed), options.tokens, options.device
    )
    loading_s = time.perf_counter() - started_s
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for way in options.ways:
            for method in options.methods:
                rows.append(timed_build(slot, method, way, options, Path(directory)))
                print(f"{method} {way}-way: {rows[-1]['seconds']} s", flush=True)
    device = torch.cuda.get_device_name() if slot.device.type == "cuda" else "CPU"
    figures = {"device": device, "model": options.model.name, "seed": options.seed, "loading_s": round(loading_s, 1)}
    write_result(options.out, {**figures, "builds": rows})
    print(markdown_table(["method", "way", "seconds"], [[str(value) for value in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
