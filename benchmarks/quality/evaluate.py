"""What a brownout level costs in quality: tasks, perplexity, agreement with level 0, generated text.

    python -m benchmarks.quality.evaluate --model DIR --data DATA                 in this process
    python -m benchmarks.quality.evaluate --base-url http://127.0.0.1:8000 \\
        --name MODEL --tokenizer DIR --data DATA                                  through a server

DATA has eval/ (piqa_valid, copa_dev, openbookqa_train_first1000 or openbookqa_test as .jsonl.gz; C-Eval as
benchmarks/quality/ceval.py says) and text/ (gutenberg_heldout.txt.gz, wikitext2_valid.txt.gz); what is missing can be
left out with --tasks and --texts.

The accuracy table of BrownoutServe (arXiv 2507.17133) for a real checkpoint: its rule at thresholds 0.6 and 0, its
united experts (distilled on their members' mixture) of every way:

    brownoutserve unite MODEL --text TEXT --way 2 --way 4 --way 8 --method mixture && \\
    python -m benchmarks.quality.evaluate --model MODEL --data DATA --ladder benchmarks/quality/paper_levels.json

Without --method and --ladder, and with `brownoutserve calibrate MODEL --text HELD_OUT_TEXT` between the two, the same
for this project's builds and measured levels. United experts are MODEL/united-* unless --united names others.

In this process every level is pinned in turn. Through a server it is the operator who pins: the tool runs
`brownoutserve brownout set LEVEL` for each of --levels and `brownout auto` at the end, or measures the level in force
when none is given. A server tells only its likeliest tokens, so KL is measured in this process only.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.quality.forced import ForcedModel
from benchmarks.quality.generation import Continuations, compare_continuations, describe
from benchmarks.quality.questions import accuracy
from benchmarks.quality.scorers import EngineScorer, ServerScorer
from benchmarks.quality.scoring import Request, Scorer, TokenScore
from benchmarks.quality.tasks import TASKS, load_task
from benchmarks.results import RESULTS, markdown_table, result_file, write_result
from benchmarks.training import corpus
from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.types import Levels
from engine.unite.calibration import read_text
from engine.weights.manifest import CheckpointError

TEXTS = {"gutenberg": "gutenberg_heldout.txt.gz", "wikitext2": "wikitext2_valid.txt.gz"}
PROMPT_TOKENS, NEW_TOKENS = 64, 96  # of the generation check


@dataclass(frozen=True, slots=True)
class Target:
    """Something to evaluate: its levels, and how to get a scorer that is pinned at one of them."""

    name: str
    levels: tuple[int, ...]
    level_names: tuple[str, ...]
    encode: Callable[[str], list[int]]
    scorer_at: Callable[[int], Scorer]
    engine: Engine | None
    let_go: Callable[[], None] = lambda: None


def evaluate(target: Target, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per level; level 0 comes first, whether or not it was asked for, since the others refer to it."""
    tasks = {name: load_task(name, options.data / "eval", options.limit) for name in options.tasks}
    texts = {name: _requests(options.data / "text" / TEXTS[name], target, options) for name in options.texts}
    prompts = [request.ids[:PROMPT_TOKENS] for requests in list(texts.values())[:1] for request in requests]
    exact_scores: dict[str, list[list[TokenScore]]] = {}
    exact_text: Continuations | None = None
    longest = options.max_model_len - 1  # one token is always generated
    for level in sorted({0, *target.levels}):
        started_s = time.monotonic()
        scorer = target.scorer_at(level)
        row: dict[str, Any] = {"level": level, "name": target.level_names[level] if target.level_names else str(level)}
        row["tasks"] = {
            name: round(accuracy(asked, scorer, target.encode, longest), 4) for name, asked in tasks.items()
        }
        row["num_questions"] = {name: len(asked) for name, asked in tasks.items()}
        row["texts"] = {}
        for name, requests in texts.items():
            scores = scorer.token_scores(requests)
            exact_scores.setdefault(name, scores)
            row["texts"][name] = _text_figures(scores, exact_scores[name])
            if target.engine is not None:
                row["texts"][name]["kl"] = _kl(target.engine, level, requests)
        if prompts:
            text = Continuations(scorer.continue_greedily(prompts, NEW_TOKENS), NEW_TOKENS)
            exact_text = exact_text or text
            row["generation"] = describe(text) | compare_continuations(text, exact_text)
        row["seconds"] = round(time.monotonic() - started_s, 1)
        yield row


def _requests(path: Path, target: Target, options: argparse.Namespace) -> list[Request]:
    text = read_text(path)
    ids = target.encode(corpus.unwrap(text) if "gutenberg" in path.name else text)
    length, possible = options.tokens, len(ids) // options.tokens
    count = min(options.sequences, possible)
    starts = [possible * i // count * length for i in range(count)]
    return [Request(tuple(ids[start : start + length]), 1) for start in starts]


def _text_figures(scores: list[list[TokenScore]], exact: list[list[TokenScore]]) -> dict[str, float]:
    """Perplexity, and against level 0: dNLL with its standard error over sequences, and how often the likeliest
    token is the same."""
    losses = [-sum(t.logprob for t in tokens) / len(tokens) for tokens in scores]
    differences = [
        loss + sum(t.logprob for t in tokens) / len(tokens) for loss, tokens in zip(losses, exact, strict=True)
    ]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1)
    pairs = [(a, b) for tokens, others in zip(scores, exact, strict=True) for a, b in zip(tokens, others, strict=True)]
    return {
        "perplexity": round(math.exp(sum(losses) / len(losses)), 4),
        "dnll": round(mean, 5),
        "se": round((variance / len(differences)) ** 0.5, 5),
        "agreement": round(sum(a.greedy_id == b.greedy_id for a, b in pairs) / len(pairs), 4),
    }


def _kl(engine: Engine, level: int, requests: Sequence[Request]) -> float:
    """KL(level 0, level) per token, in prefill steps, on the engine's own model."""
    import torch

    slot = engine.leave()
    try:
        sequences = torch.tensor([request.ids for request in requests])
        forced = ForcedModel(slot, max_batch=1, max_tokens=sequences.shape[1])
        resolved = slot.ladder.resolve(Levels(level, level), 2048)
        total = 0.0
        for part in sequences.split(16):  # bounds the logits that are kept
            reference = forced.reference(part, None)
            total += forced.compare(part, resolved.prefill, None, reference).kl * len(part)
        return round(total / len(sequences), 5)
    finally:
        engine.take_up(slot)


def open_engine(options: argparse.Namespace) -> Target:
    beside = tuple(str(path.resolve()) for path in sorted(options.model.glob("united-*")) if path.is_dir())
    brownout = BrownoutConfig(
        united=tuple(options.united) or beside or "average",
        ladder=str(options.ladder.resolve()) if options.ladder else "",
        allow_unmeasured=True,
        profile_repeats=0,
        exempt_first=options.exempt_first,
        exempt_last=options.exempt_last,
    )
    config = EngineConfig(
        ModelConfig(str(options.model), max_model_len=options.max_model_len),
        CacheConfig(prefix_caching=False),
        SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
        brownout=brownout,
        device=options.device,
    )
    try:
        engine = Engine(config)
    except (ConfigError, CheckpointError) as error:
        raise SystemExit(str(error)) from error
    levels = tuple(range(engine.info.num_levels)) if options.levels == "all" else _numbers(options.levels)
    too_high = [level for level in levels if level >= engine.info.num_levels]
    if too_high:
        raise SystemExit(f"the model has levels 0 to {engine.info.num_levels - 1}; asked for {too_high}")
    encode = engine.tokenizer.encode
    return Target(
        engine.info.name, levels, engine.info.level_names, encode, lambda level: EngineScorer(engine, level), engine
    )


def open_server(options: argparse.Namespace) -> Target:
    if options.name is None or options.tokenizer is None:
        raise SystemExit("--base-url needs --name, the model's name there, and --tokenizer, a directory")
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    scorer = ServerScorer(options.base_url, options.name, os.environ.get("OPENAI_API_KEY", "none"))
    pinned = options.levels != "all"

    def brownout(*policy: str) -> None:
        subprocess.run([sys.executable, "-m", "cluster.cli", "brownout", *policy], check=True)

    def scorer_at(level: int) -> Scorer:
        if pinned:
            brownout("set", str(level))
            scorer.wait_applied(options.settle_s)
        return scorer

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text).ids
        return ids

    def let_go() -> None:
        if pinned:
            brownout("auto")

    levels = _numbers(options.levels) if pinned else (0,)
    return Target(options.name, levels, (), encode, scorer_at, None, let_go)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--model", type=Path, help="Hugging Face directory, run in this process")
    target.add_argument("--base-url", help="a server with an OpenAI API; its key from OPENAI_API_KEY")
    parser.add_argument("--name", help="the model's name at the server")
    parser.add_argument("--tokenizer", type=Path, help="directory with the server's model's tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with eval/ and text/")
    parser.add_argument("--levels", default="all", help="'all', or numbers with commas between; default: %(default)s")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--texts", nargs="*", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--limit", type=int, help="questions per task; default: all")
    parser.add_argument("--sequences", type=int, default=64, help="of each text; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence; default: %(default)s")
    parser.add_argument(
        "--united", nargs="*", default=[], help="directories of united experts; default: MODEL/united-*"
    )
    parser.add_argument("--ladder", type=Path, help="ladder JSON; default: ladder.json beside the model")
    parser.add_argument("--exempt-first", type=int, default=2, help="layers never dimmed; default: %(default)s")
    parser.add_argument("--exempt-last", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--max-model-len", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--settle-s", type=float, default=2.0, help="wait after all replicas follow a pinned level")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=result_file, default=RESULTS / "evaluation.json", help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = parse()
    target = open_engine(options) if options.model else open_server(options)
    rows = []
    try:
        for row in evaluate(target, options):
            rows.append(row)
            print(f"level {row['level']} ({row['name']}): {row['tasks']} {row['texts']}", flush=True)
            write_result(options.out, {"model": target.name, "levels": rows})
    finally:
        target.let_go()
    header = ["level", *options.tasks, *(f"{name} perplexity" for name in options.texts), "agreement"]
    table = [
        [
            str(row["level"]),
            *(f"{row['tasks'][name]:.1%}" for name in options.tasks),
            *(f"{row['texts'][name]['perplexity']:.2f}" for name in options.texts),
            *(f"{row['texts'][name]['agreement']:.1%}" for name in options.texts[:1]),
        ]
        for row in rows
    ]
    print(markdown_table(header, table))


if __name__ == "__main__":
    main()
