"""Swapping united experts under load: nothing dropped, level 0 exact, refused artefacts change nothing."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.async_engine import AsyncEngine
from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.engine import Engine
from engine.moe.united import ArtefactError, layer_file
from engine.types import BrownoutSetting, FinishReason, GenerationRequest, SamplingParams, ServiceClass
from tests.models import write_checkpoint
from tests.united import change_manifest, write_united

PROMPT = tuple(range(5, 15))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("model"))
    for name, way, seed in (("a4", 4, 1), ("b4", 4, 2), ("a2", 2, 3)):
        write_united(directory / name, directory, way, seed)
    return directory


def config(model: Path, **brownout: object) -> EngineConfig:
    options: dict[str, object] = {"united": "a4", "exempt_first": 0, "exempt_last": 0, "profile_repeats": 0}
    return EngineConfig(
        ModelConfig(str(model)),
        CacheConfig(num_blocks=65),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        brownout=BrownoutConfig(allow_unmeasured=True, **options | brownout),  # type: ignore[arg-type]
        device="cpu",
    )


def add(engine: Engine, name: str, service_class: ServiceClass = ServiceClass.STANDARD, max_tokens: int = 24) -> None:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(GenerationRequest(name, PROMPT, sampling, service_class))


def run(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            assert output.finish_reason in (None, FinishReason.LENGTH)
    return tokens


def tables(engine: Engine) -> dict[int, torch.Tensor]:
    assert engine._runner is not None
    return {layer: experts.gate_up for layer, experts in engine._runner.slot.model.experts.items()}


def test_under_load_all_requests_finish_and_full_ones_stay_exact(model: Path) -> None:
    undisturbed = Engine(config(model))
    add(undisturbed, "full", ServiceClass.FULL)
    expected = run(undisturbed)["full"]

    engine = Engine(config(model))
    engine.apply_setting(BrownoutSetting.pinned(2))
    add(engine, "full", ServiceClass.FULL)
    for index in range(4):
        add(engine, f"standard-{index}")
    engine.step()
    originals = {layer: table[:12].clone() for layer, table in tables(engine).items()}
    swap = engine.swap_united("b4")
    ends: list[Exception | None] = []
    swap.on_end(ends.append)
    tokens = run(engine)
    assert ends == [None]
    assert tokens["full"] == expected[-len(tokens["full"]) :]
    assert all(len(tokens[f"standard-{index}"]) >= 23 for index in range(4))
    for layer, table in tables(engine).items():
        assert torch.equal(table[:12], originals[layer])
        assert torch.equal(table[12:], load_file(layer_file(model / "b4", layer))["gate_up"])


def test_a_layer_is_swapped_between_two_steps(model: Path) -> None:
    engine = Engine(config(model))
    add(engine, "a", max_tokens=100)
    engine.step()
    new = {layer: load_file(layer_file(model / "b4", layer))["gate_up"] for layer in range(3)}
    swap = engine.swap_united("b4")
    num_new = [0]
    while engine._swap is not None:
        swap._reader._next and swap._reader._next.result()
        engine.step()
        num_new.append(sum(torch.equal(table[12:], new[layer]) for layer, table in tables(engine).items()))
    assert num_new == sorted(num_new)
    assert num_new[-1] == 3
    assert max(b - a for a, b in pairwise(num_new)) == 1


def test_swapped_experts_answer_as_if_loaded_at_start(model: Path) -> None:
    answers = []
    for start, swapped in (("b4", None), ("a4", "b4")):
        engine = Engine(config(model, united=start))
        if swapped:
            engine.swap_united(swapped)
            run(engine)
        engine.apply_setting(BrownoutSetting.pinned(2))
        add(engine, "a")
        answers.append(run(engine)["a"])
    assert answers[0] == answers[1]


def test_another_way_takes_free_rows_or_those_of_the_one_it_replaces(model: Path, tmp_path: Path) -> None:
    engine = Engine(config(model, united_rows=9))
    engine.swap_united("a2")  # beside the 4-way ones
    run(engine)
    assert engine._runner is not None
    slot = engine._runner.slot
    assert slot.dimming.table is not None and slot.dimming.table.ways == (2, 4)
    levels = [{"way": 1, "share": 0}, *({"way": 2, "share": b} for b in (0.5, 1.0))]
    ladder = tmp_path / "ladder.json"
    ladder.write_text(json.dumps({"levels": levels}))
    engine = Engine(config(model, united_rows=6))
    with pytest.raises(ArtefactError, match="2-way united experts need 6 rows"):
        engine.swap_united("a2")
    with pytest.raises(ConfigError, match=r"ladder .* also needs \[4\]"):
        engine.plan_swap("a2", replaces=4)
    engine.swap_united(engine.plan_swap("a2", ladder=str(ladder), replaces=4))
    run(engine)
    assert engine.info.level_names == ("exact", "2-way b=0.5", "2-way b=1")
    engine.apply_setting(BrownoutSetting.pinned(2))
    add(engine, "a")
    assert len(run(engine)["a"]) == 24


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: change_manifest(d, model_digest="0" * 64), "were built for the model"),
        (lambda d: layer_file(d, 2).write_bytes(layer_file(d, 2).read_bytes()[:-9]), "are damaged"),
        (lambda d: (d / "united.json").unlink(), "have no united.json"),
    ],
)
def test_a_refused_artefact_leaves_everything_as_it_was(
    model: Path, tmp_path: Path, damage: object, complaint: str
) -> None:
    bad = Path(shutil.copytree(model / "b4", tmp_path / "bad"))
    damage(bad)  # type: ignore[operator]
    engine = Engine(config(model))
    before = {layer: table.clone() for layer, table in tables(engine).items()}
    info = engine.info
    with pytest.raises(ArtefactError, match=complaint):
        engine.swap_united(str(bad))
    assert not engine.has_work
    assert engine.info == info
    assert all(torch.equal(table, before[layer]) for layer, table in tables(engine).items())


def test_files_that_vanish_half_way_leave_the_way_unused(model: Path, tmp_path: Path) -> None:
    vanishing = Path(shutil.copytree(model / "b4", tmp_path / "vanishing"))
    engine = Engine(config(model))
    plan = engine.plan_swap(str(vanishing))
    layer_file(vanishing, 2).unlink()
    ends: list[Exception | None] = []
    engine.swap_united(plan).on_end(ends.append)
    run(engine)
    assert isinstance(ends[0], ArtefactError)
    engine.apply_setting(BrownoutSetting.pinned(2))
    add(engine, "a")
    while engine.has_work:
        outputs = engine.step()
    assert outputs[-1].usage is not None
    assert outputs[-1].usage.brownout.dimmed_pairs == 0


def test_one_swap_at_a_time(model: Path) -> None:
    engine = Engine(config(model))
    engine.swap_united("b4")
    with pytest.raises(RuntimeError, match="swapping united experts already"):
        engine.swap_united("b4")


def test_an_engine_that_cannot_dim_has_no_room(model: Path) -> None:
    with pytest.raises(ConfigError, match="cannot dim"):
        Engine(config(model, united="average")).swap_united("b4")


async def test_an_async_engine_swaps_while_it_generates(model: Path) -> None:
    engine = await AsyncEngine.start(config(model))
    try:
        sampling = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        stream = engine.generate(GenerationRequest("a", PROMPT, sampling))
        first = await anext(stream)
        await engine.swap_united("b4")
        rest = [token for output in [output async for output in stream] for token in output.token_ids]
        assert len(first.token_ids) + len(rest) == 60
        with pytest.raises(ArtefactError, match="have no united"):
            await engine.swap_united("nowhere")
    finally:
        await engine.stop()
