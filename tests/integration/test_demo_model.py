"""The shipped demo: its model answers as transformers does, its ladder is measured and belongs to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.serve_file import load_serve_file
from engine.config import BrownoutConfig, EngineConfig
from engine.engine import Engine
from engine.moe.ladder import LADDER_FILE, read_ladder
from engine.types import BrownoutSetting, GenerationRequest, SamplingParams
from tests.models import PROJECT_ROOT

PROMPTS = ("The lamp burns", '"I do not believe it," said the old man', "In the year 1805")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def config() -> EngineConfig:
    return load_serve_file(PROJECT_ROOT / "deploy/serve/demo.yaml").config.engine_config()


def answers(config: EngineConfig, level: int) -> list[tuple[int, ...]]:
    """Greedy tokens after each prompt, all in one batch."""
    engine = Engine(replace(config, brownout=replace(config.brownout, profile_repeats=0)))
    engine.apply_setting(BrownoutSetting.pinned(level, "test"))
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    said: dict[str, tuple[int, ...]] = {}
    for prompt in PROMPTS:
        engine.add(GenerationRequest(prompt, tuple(engine.tokenizer.encode(prompt)), params))
        said[prompt] = ()
    while engine.has_work:
        for output in engine.step():
            said[output.request_id] += tuple(output.token_ids)
    return [said[prompt] for prompt in PROMPTS]


def widened(directory: Path, out: Path) -> Path:
    """The same checkpoint without fp8: each code times the scale of its block of 128 x 128."""
    stored, wide = load_file(directory / "model.safetensors"), {}
    for name, tensor in stored.items():
        scales = stored.get(name + "_scale_inv")
        if scales is not None:
            by_block = torch.kron(scales, torch.ones(128, 128))[: tensor.shape[0], : tensor.shape[1]]
            wide[name] = tensor.float() * by_block
        elif not name.endswith("_scale_inv"):
            wide[name] = tensor.float()
    out.mkdir()
    save_file(wide, out / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((directory / "config.json").read_text())
    del content["quantization_config"]
    (out / "config.json").write_text(json.dumps(content))
    shutil.copy(directory / "tokenizer.json", out)
    return out


def test_greedy_tokens_equal_transformers(config: EngineConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    directory = widened(Path(config.model.path), tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        ends = {"eos_token_id": None, "pad_token_id": 0}
        new = model.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, **ends)
        expected.append(tuple(new[0, ids.shape[1] :].tolist()))
    assert answers(config, 0) == expected


def test_dimming_is_there_and_level_0_does_not_know_of_it(config: EngineConfig) -> None:
    strongest = len(read_ladder(Path(config.model.path) / LADDER_FILE)) - 1
    exact = answers(config, 0)
    assert exact == answers(replace(config, brownout=BrownoutConfig()), 0)
    assert answers(config, strongest) != exact


def test_the_ladder_is_measured_and_pays(config: EngineConfig) -> None:
    ladder = read_ladder(Path(config.model.path) / LADDER_FILE)
    engine = Engine(replace(config, brownout=replace(config.brownout, profile_repeats=0)))
    assert engine.info.num_levels == len(ladder) > 2
    assert ladder.measured and not config.brownout.allow_unmeasured
    for bucket in ladder.buckets:
        strongest = bucket.levels[-1]
        assert strongest.loss is not None and strongest.loss < 1
        assert strongest.step_frac is not None and strongest.step_frac < 0.85


def test_weights_take_less_than_12_mb(config: EngineConfig) -> None:
    files = list(Path(config.model.path).rglob("*.safetensors"))
    assert len(files) > 1
    assert sum(path.stat().st_size for path in files) <= 12_000_000
