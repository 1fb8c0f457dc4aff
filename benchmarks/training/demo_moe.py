"""Train demo-moe, the small model that `make demo` and `make serve` use: 60 experts, top-4, English books.

    python -m benchmarks.training.demo_moe gutenberg_train_160mb.txt.xz --held-out gutenberg_heldout.txt.gz \\
        --tokenizer deploy/models/demo-moe --minutes 4 --out deploy/models/demo-moe

Four minutes on one H100 give the weights in the repository; a CPU takes hours (``--minutes 1`` shows that it runs).
Writes model.safetensors, config.json and the model card, README.md. The tokenizer comes from
`benchmarks.training.tokenizer`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks import environment
from benchmarks.training import corpus
from benchmarks.training.expert_compute import EXPERT_COMPUTE
from benchmarks.training.loop import (
    ClockSchedule,
    TokenBatches,
    held_out_loss,
    lm_loss,
    make_optimizer,
    sample_text,
    set_rate,
)
from benchmarks.training.moe_model import MoeConfig, MoeLm

NUM_HELD_OUT = 64  # sequences
BALANCE_WEIGHT = 0.01
MAX_BYTES = 10_000_000  # 12 MB, less the united experts
SAMPLE_PROMPTS = ("The old man looked at the sea and", '"I do not believe it," said', "It was a cold morning, and the")
CARD = Path(__file__).resolve().parent / "demo_moe_card.md"


def demo_config(vocab_size: int, end_token_id: int) -> MoeConfig:
    """9 million parameters, as many of them as possible in experts: on a CPU only their work is worth dimming.

    Few wide layers, because a layer's fixed work is not dimmed; fp8, so that they and the 8-way united experts (as
    bfloat16) take less than 12 MB.
    """
    return MoeConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        expert_size=112,
        shared_size=128,
        norm_topk_prob=False,
        max_position=2048,
        end_token_id=end_token_id,
        fp8=True,
    )


def train(model: MoeLm, batches: TokenBatches, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Trains for ``seconds``; returns what it did."""
    device = next(model.parameters()).device
    step_model = torch.compile(model) if options.compile else model
    optimizer = make_optimizer(model, options.learning_rate, weight_decay=0.1)
    schedule = ClockSchedule(seconds)
    num_steps, started_s, loss = 0, time.monotonic(), torch.zeros(())
    while (passed := schedule.passed_frac) < 1:
        set_rate(optimizer, options.learning_rate * schedule.rate(passed))
        tokens = batches.draw(options.batch, options.tokens)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, balance = step_model(tokens[:, :-1])
        loss = lm_loss(logits, tokens[:, 1:])
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_steps += 1
        if num_steps % options.log_every == 0:
            print(
                f"step {num_steps}, {passed:.0%} of the time: loss {loss.item():.3f}, balance {balance.item():.2f}",
                flush=True,
            )
    took_s = time.monotonic() - started_s
    num_tokens = num_steps * options.batch * options.tokens
    return {
        "num_steps": num_steps,
        "num_tokens": num_tokens,
        "seconds": round(took_s, 1),
        "tokens_per_s": round(num_tokens / took_s),
        "train_loss": round(loss.item(), 4),
    }


def write_card(directory: Path, model: MoeLm, figures: dict[str, Any], samples: list[str]) -> None:
    """The model card: the template beside this script, filled with what was measured."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    quoted = "\n\n".join("> " + " ".join(sample.split()) for sample in samples)
    card = CARD.read_text().format(
        num_parameters=f"{num_parameters / 1e6:.2f}",
        num_layers=model.config.num_layers,
        samples=quoted,
        **{key: f"{value:,}" if isinstance(value, int) else value for key, value in figures.items()},
    )
    (directory / "README.md").write_text(card)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="training text: plain, .gz, .xz, or .npy of token ids")
    parser.add_argument("--held-out", type=Path, required=True, help="text to measure the loss on")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--minutes", type=float, default=4.0, help="training time; default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, help="sequences per step; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence; default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="highest; default: %(default)s")
    parser.add_argument("--experts", choices=sorted(EXPERT_COMPUTE), default="dense", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: faster after a minute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=100, help="steps; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(options.device)
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    tokens = corpus.load_tokens(options.texts, tokenizer)
    held_out = corpus.windows(corpus.load_tokens([options.held_out], tokenizer), NUM_HELD_OUT, options.tokens + 1)
    print(f"{len(tokens):,} training tokens on {device}", flush=True)

    config = demo_config(tokenizer.get_vocab_size(), tokenizer.token_to_id(corpus.END_OF_DOCUMENT))
    model = MoeLm(config, options.experts)
    model.init_weights(options.seed)
    model.to(device)
    figures = train(model, TokenBatches(tokens, device, options.seed), options.minutes * 60, options)
    figures["bfloat16_held_out_loss"] = round(held_out_loss(model, held_out, batch=8), 4)
    model.round_to_stored_()
    figures["held_out_loss"] = round(held_out_loss(model, held_out, batch=8), 4)
    figures["held_out_perplexity"] = round(2.718281828 ** figures["held_out_loss"], 2)
    figures["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    samples = []
    for text in SAMPLE_PROMPTS:
        prompt = torch.tensor([tokenizer.encode(text).ids], device=device)
        samples.append(tokenizer.decode(sample_text(model, prompt, 80, temperature=0.7, seed=options.seed)[0].tolist()))
    model.save(options.out)
    size = (options.out / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"the weights take {size:,} bytes; at most {MAX_BYTES:,} are wanted")
    figures["num_bytes"] = size
    write_card(options.out, model, figures, samples)
    print(json.dumps({**figures, **environment.describe()}, indent=2))
    print("\n\n".join(samples))


if __name__ == "__main__":
    main()
