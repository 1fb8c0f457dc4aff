"""The rows of the quality table: every dimmer, way and strength at every step size, against level 0."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.forced import ForcedModel, ForcedScorer, Reference
from benchmarks.quality.questions import Question, accuracy
from benchmarks.quality.tasks import load_task
from engine.config import BrownoutConfig, CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.moe.ladder import Ladder, Level
from engine.moe.settings import DimmerKind, DimSetting
from engine.moe.united import UnitedArtefact
from engine.pool.slots import ModelSlot, load_slot
from engine.text.tokenizer import load_tokenizer

WAYS = (2, 4, 8)
TASKS = ("piqa", "copa", "openbookqa")  # the model's parent knows no Chinese: C-Eval would be chance
SIZES: tuple[int | None, ...] = (128, 32, 8, None)  # decode batches; None: prefill steps of 2,048 tokens
SWEEP_SIZES = (16, 64)  # more batches for the crossover of piggyback and united experts
NUM_SEQUENCES = {8: 32, 16: 32, 32: 64, 64: 64}  # fewer of them where a step has few; else all
TASK_LIMITS = {128: 400, 32: 120, 8: 60, None: None}  # questions per task; None: all
MAX_TOKENS = 512  # of a question with its answer
BASELINE_BUILDS = ("instant", "mixture", "frequency", "average")
RANDOM_HOT = (0.3, 0.6)  # shares of experts in a random hot set


@dataclass(frozen=True, slots=True)
class Plan:
    """One row to measure. ``build``: the method of the united experts, where the setting uses them.

    ``random_hot``: share of each layer's experts that stay hot whatever the step routes to, drawn once, as the fused
    path of the paper's published code does it.
    """

    setting: DimSetting
    size: int | None
    build: str = ""
    random_hot: float = 0.0

    @property
    def key(self) -> str:
        random_hot = f" random hot {self.random_hot}" if self.random_hot else ""
        return f"{self.setting.name} {self.size or 'prefill'} {self.build}{random_hot}"

    @property
    def dimmer(self) -> str:
        return "random mask" if self.random_hot else self.setting.kind.name.lower()


def settings() -> list[DimSetting]:
    """All dimmers, from mild to strong."""
    united = [
        DimSetting(kind, way=way, share=share)
        for kind, ways in ((DimmerKind.UNITED, WAYS), (DimmerKind.PAPER, (4,)))
        for way in ways
        for share in (0.4, 0.7, 1.0)
    ]
    piggyback = [DimSetting(DimmerKind.PIGGYBACK, keep=keep) for keep in (1, 2, 3)]
    budgets = [DimSetting(DimmerKind.PIGGYBACK, keep=1, budget=budget) for budget in (20, 30)]
    similar = [DimSetting(DimmerKind.SIMILAR, keep=keep) for keep in (1, 2)]
    top_k = [DimSetting(DimmerKind.TOPK, top_k=(k,)) for k in (3, 2, 1)]
    return united + piggyback + budgets + similar + top_k


def plans() -> list[Plan]:
    """What decides the claims first, so that a run cut short still says something."""
    kinds = (DimmerKind.UNITED, DimmerKind.PAPER)
    build = {kind: "routed" if kind in kinds else "" for kind in DimmerKind}
    main = [Plan(setting, size, build[setting.kind]) for size in SIZES for setting in settings()]
    whole = DimSetting(DimmerKind.UNITED, way=4, share=1.0)
    builds = [Plan(whole, 128, method) for method in BASELINE_BUILDS]
    builds += [Plan(whole, 128, f"routed-4-{grouping}") for grouping in ("consecutive", "apart", "similar")]
    builds += [Plan(whole, size, "routed", random_hot) for size in (128, 32) for random_hot in RANDOM_HOT]
    sweep = [
        Plan(setting, size, build[setting.kind])
        for size in SWEEP_SIZES
        for setting in settings()
        if setting.kind is DimmerKind.PIGGYBACK or (setting.kind is DimmerKind.UNITED and setting.way in (2, 4))
    ]
    return [Plan(DimSetting(), size) for size in SIZES] + builds + main + sweep


def measure_rows(
    model: Path,
    builds: Path,
    similarity: Path,
    sequences: Tensor,
    tasks_directory: Path,
    rows_file: Path,
    share: tuple[int, int],
    deadline_s: float,
    task_limit: int | None,
    device: str,
) -> None:
    """Appends this process's share of the rows to ``rows_file``, those that it already holds left out.

    sequences [S, T]: held-out text. Stops at ``deadline_s`` (time.monotonic) after a whole row.
    """
    wanted = plans()[share[0] :: share[1]]
    done = {row["key"] for row in read_rows_files([rows_file] if rows_file.exists() else [])}
    wanted = [plan for plan in wanted if plan.key not in done]
    if not wanted:
        return
    all_settings = [DimSetting(), *dict.fromkeys(plan.setting for plan in wanted if not plan.setting.exact)]
    forced = _load(model, builds, similarity, all_settings, rows_file, device)
    united = _UnitedBuilds(forced.slot, builds)
    encode = load_tokenizer(str(model)).encode
    questions = {name: load_task(name, tasks_directory) for name in TASKS}
    reference: Reference | None = None
    for plan in wanted:
        if time.monotonic() > deadline_s:
            return
        started_s = time.perf_counter()
        united.use(plan)
        _draw_hot_set(forced.slot.dimming.dimmer.protected, plan.random_hot)
        if reference is None:
            reference = forced.reference(sequences, min(128, len(sequences)))
        setting = all_settings.index(plan.setting)
        part = sequences[: NUM_SEQUENCES.get(plan.size or 0, len(sequences))]
        of_part = Reference(reference.logits[: len(part)], reference.nll[: len(part)])
        comparison = forced.compare(part, setting, plan.size, of_part)
        row = {
            "key": plan.key,
            "model": "quality-moe",
            "dimmer": plan.dimmer,
            "way": plan.setting.way,
            "param": plan.setting.to_json(),
            "build": plan.build,
            "batch": plan.size or "prefill 2048",
            "experts": round(forced.distinct_experts(part, setting, plan.size), 2),
            "nll": round(float(of_part.nll.mean()) + comparison.dnll, 5),
            "dnll": round(comparison.dnll, 5),
            "se": round(comparison.se, 5),
            "kl": round(comparison.kl, 5),
            "agreement": round(comparison.agreement, 4),
            "tasks": _tasks(ForcedScorer(forced, setting, plan.size), questions, plan.size, task_limit, encode),
        }
        row["seconds"] = round(time.perf_counter() - started_s, 1)
        with rows_file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{plan.key}: {row['experts']} experts, dNLL {row['dnll']} +- {row['se']}, KL {row['kl']}, "
            f"{row['tasks']}, {row['seconds']} s",
            flush=True,
        )


def _load(
    model: Path, builds: Path, similarity: Path, all_settings: Sequence[DimSetting], rows_file: Path, device: str
) -> ForcedModel:
    """The engine's model with every setting as a level and the routed builds of all ways."""
    ladder_file = rows_file.with_suffix(".ladder.json")
    Ladder.uniform([Level(setting) for setting in all_settings]).write(ladder_file)
    slot = load_slot(
        EngineConfig(
            ModelConfig(str(model), max_model_len=MAX_TOKENS),
            CacheConfig(num_blocks=128 * (MAX_TOKENS // 16) + 1, prefix_caching=False),
            SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=2048),
            brownout=BrownoutConfig(
                ways=WAYS,
                united=tuple(str(builds / f"routed-{way}") for way in WAYS),
                ladder=str(ladder_file),
                similarity=str(similarity),
                allow_unmeasured=True,
            ),
            device=device,
        )
    )
    assert slot.ladder.settings == tuple(all_settings)
    return ForcedModel(slot, max_batch=128, max_tokens=MAX_TOKENS)


class _UnitedBuilds:
    """Puts the build that a plan names in place of the one loaded."""

    def __init__(self, slot: ModelSlot, builds: Path) -> None:
        self._table, self._builds = slot.dimming.table, builds
        self._loaded = {way: f"routed-{way}" for way in WAYS}

    def use(self, plan: Plan) -> None:
        way = plan.setting.way
        if not plan.build:
            return
        name = plan.build if plan.build.startswith("routed-") else f"{plan.build}-{way}"
        if self._loaded[way] != name:
            assert self._table is not None
            source = UnitedArtefact(self._builds / name)
            for layer in self._table.layers:
                self._table.load_layer(source, layer)
            self._loaded[way] = name


def _draw_hot_set(protected: Tensor, share: float) -> None:
    """protected [L, E] bool, written in place; a protected expert keeps its pairs."""
    scores = torch.rand(protected.shape, generator=torch.Generator().manual_seed(0))
    protected.copy_(scores.argsort(dim=1).argsort(dim=1) < round(share * protected.shape[1]))


def _tasks(
    scorer: Any, questions: dict[str, list[Question]], size: int | None, limit: int | None, encode: Any
) -> dict[str, Any]:
    """Accuracy and number of questions of each task; {} for the sizes at which tasks would take too long."""
    if limit is None:
        limit = TASK_LIMITS.get(size, 0)
    if limit == 0:
        return {}
    result = {}
    for name, of_task in questions.items():
        asked = (
            of_task if limit is None else [of_task[len(of_task) * i // limit] for i in range(min(limit, len(of_task)))]
        )
        if asked:
            result[name] = {"accuracy": round(accuracy(asked, scorer, encode), 4), "num_questions": len(asked)}
    return result


def read_rows_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of all processes; of two with one key the later."""
    rows = {row["key"]: row for path in paths for row in map(json.loads, path.read_text().splitlines())}
    return list(rows.values())


def read_builds(directory: Path) -> list[dict[str, Any]]:
    """method, way, grouping, seconds and held-out error of every artefact in ``directory``."""
    return list(_builds(directory))


def _builds(directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(directory.iterdir()):
        manifest = UnitedArtefact(path).manifest
        yield {
            "name": path.name,
            "method": manifest.method,
            "way": manifest.way,
            "seconds": round(manifest.details["seconds"], 2),
            "held_out_error": round(manifest.details["held_out_error"], 4),
            "groups_refused": sum(sum(layer.do_not_use) for layer in manifest.layers.values()),
        }
