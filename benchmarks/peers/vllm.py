"""vLLM as the peer: the same checkpoint, card and lengths as benchmarks.offline_gpu. Needs vLLM, nothing of ours.

Greedy, no prefix caching, no detokenizing (ours detokenizes). A decode step is the time of 65 tokens less that of one,
divided by 64: wall time, host work included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

SEED = 0
WARM_UP_REQUESTS = 64
DECODE_BATCH_SIZES = (1, 8, 16, 32, 64, 128, 256)
DECODE_PROMPT_TOKENS = 128
DECODE_TOKENS = 65
PREFILLS = ((16, 512), (64, 256), (64, 1024), (32, 2048))  # sequences, tokens each
MAX_MODEL_LEN = 4096
PREFILL_STEP_TOKENS = 16384

Lengths = list[tuple[int, int]]  # prompt tokens, output tokens


class Peer:
    def __init__(self, checkpoint: Path, max_num_seqs: int, memory_frac: float) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams
        self._rng = random.Random(SEED)
        self._llm: Any = LLM(
            model=str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=PREFILL_STEP_TOKENS,
            gpu_memory_utilization=memory_frac,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def seconds(self, lengths: Lengths) -> float:
        """To serve all requests at once."""
        prompts = [{"prompt_token_ids": [self._rng.randrange(10, 151_000) for _ in range(n)]} for n, _ in lengths]
        sampling = [
            self._sampling(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in lengths
        ]
        start_s = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        elapsed_s = time.perf_counter() - start_s
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == sum(n for _, n in lengths)
        return elapsed_s

    def best_s(self, lengths: Lengths, repeats: int = 2) -> float:
        return min(self.seconds(lengths) for _ in range(repeats))

    def decode_step_ms(self, batch: int) -> float:
        one = self.best_s([(DECODE_PROMPT_TOKENS, 1)] * batch)
        many = self.best_s([(DECODE_PROMPT_TOKENS, DECODE_TOKENS)] * batch)
        return (many - one) / (DECODE_TOKENS - 1) * 1e3


def measure(peer: Peer, works: dict[str, Lengths]) -> dict[str, Any]:
    peer.seconds([(DECODE_PROMPT_TOKENS, 8)] * WARM_UP_REQUESTS)
    figures: dict[str, Any] = {"offline": {}}
    for work, lengths in works.items():
        peer.seconds(lengths[:WARM_UP_REQUESTS])
        seconds = peer.best_s(lengths)
        figures["offline"][work] = {
            "req_s": round(len(lengths) / seconds, 2),
            "out_tok_s": round(sum(n for _, n in lengths) / seconds),
        }
        print(work, figures["offline"][work], flush=True)
    figures["decode_step_ms"] = {str(batch): round(peer.decode_step_ms(batch), 3) for batch in DECODE_BATCH_SIZES}
    print(figures["decode_step_ms"], flush=True)
    figures["prefill_tok_s"] = {
        f"{n}x{length}": round(n * length / peer.best_s([(length, 1)] * n, 3)) for n, length in PREFILLS
    }
    print(figures["prefill_tok_s"], flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="Hugging Face directory, as `brownoutserve checkpoint` writes it")
    parser.add_argument("lengths", type=Path, metavar="LENGTHS.json", help="as for benchmarks.offline_gpu")
    parser.add_argument("--max-num-seqs", type=int, default=512, help="requests in one batch (default 512, as ours)")
    parser.add_argument("--memory-frac", type=float, default=0.9, help="share of the card's memory (default 0.9)")
    parser.add_argument("--out", type=Path, required=True, help="result file; `peer` of h100_engine.json")
    arguments = parser.parse_args()
    works = json.loads(arguments.lengths.read_text())
    start_s = time.perf_counter()
    peer = Peer(arguments.checkpoint, arguments.max_num_seqs, arguments.memory_frac)
    ready_s = round(time.perf_counter() - start_s, 1)
    print(f"ready in {ready_s} s", flush=True)
    import vllm

    described = {
        "name": "vllm",
        "version": vllm.__version__,
        "command": " ".join(["python -m benchmarks.peers.vllm", *sys.argv[1:]]),
        "seed": SEED,
        "max_num_seqs": arguments.max_num_seqs,
        "ready_s": ready_s,
    }
    arguments.out.write_text(json.dumps({**described, **measure(peer, works)}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
