"""What choosing tokens costs on one CPU core: a step of 16 rows over Qwen's vocabulary, for each sampling option.

The logits are a Zipf law over shuffled tokens, so that a few hundred of them hold most of the mass, as a language
model's do; "flat" rows are Gaussian noise, whose top_p set is most of the vocabulary.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.results import RESULTS, markdown_table, result_file, write_result
from engine.sampling.choose import sample
from engine.sampling.state import SamplingState
from engine.types import SamplingParams

VOCAB_SIZE = 151_936  # Qwen1.5-MoE-A2.7B
ZIPF_EXPONENT = 1.5
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "penalties, greedy": {"temperature": 0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "logprobs 5, greedy": {"temperature": 0, "logprobs": 5},
}


def make_logits(num_rows: int, flat: bool, seed: int) -> torch.Tensor:
    """[num_rows, V]"""
    generator = torch.Generator().manual_seed(seed)
    if flat:
        return torch.randn(num_rows, VOCAB_SIZE, generator=generator)
    zipf = -ZIPF_EXPONENT * torch.arange(1, VOCAB_SIZE + 1).log()
    return torch.stack([zipf[torch.randperm(VOCAB_SIZE, generator=generator)] for _ in range(num_rows)])


def measure_ms(logits: torch.Tensor, options: dict[str, Any], num_repeats: int) -> float:
    """Median time of a step; each row has a prompt of 500 tokens."""
    prompt = range(500)
    states = [SamplingState(SamplingParams(**options), prompt, VOCAB_SIZE, frozenset(), i) for i in range(len(logits))]
    times_ms = []
    for _ in range(num_repeats + 1):  # the first one warms up
        start_s = time.perf_counter()
        sample(logits, states)
        times_ms.append((time.perf_counter() - start_s) * 1000)
    return sorted(times_ms[1:])[num_repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step (default: 16)")
    parser.add_argument("--repeats", type=int, default=15, help="steps timed for each option (default: 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=result_file, default=RESULTS / "sampling_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logits = {name: make_logits(args.rows, name == "flat", args.seed) for name in ("zipf", "flat")}
    step_ms = {
        option: {name: round(measure_ms(rows, given, args.repeats), 2) for name, rows in logits.items()}
        for option, given in OPTIONS.items()
    }
    figures = {"rows": args.rows, "vocab_size": VOCAB_SIZE, "seed": args.seed, "threads": 1, "step_ms": step_ms}
    write_result(args.out, figures)
    cells = [[option, f"{ms['zipf']:.1f}", f"{ms['flat']:.1f}"] for option, ms in step_ms.items()]
    print(f"{args.rows} rows, {VOCAB_SIZE} tokens, one thread, seed {args.seed}; ms per step")
    print(markdown_table(["option", "zipf", "flat"], cells))
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
