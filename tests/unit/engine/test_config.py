from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from engine.config import (
    BrownoutConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    SloConfig,
)

NAN = float("nan")


@pytest.mark.parametrize(
    ("key", "value", "allowed", "make"),
    [
        ("model.path", "''", "Hugging Face", partial(ModelConfig, "")),
        ("model.load_format", "'gguf'", "safetensors, random", partial(ModelConfig, "m", load_format="gguf")),
        ("model.seed", "-1", "0 to 4294967295", partial(ModelConfig, "m", seed=-1)),
        ("model.seed", "4294967296", "0 to 4294967295", partial(ModelConfig, "m", seed=1 << 32)),
        ("model.dtype", "'int8'", "auto, float32, bfloat16, float16", partial(ModelConfig, "m", dtype="int8")),
        ("model.max_model_len", "0", "a positive number of tokens", partial(ModelConfig, "m", max_model_len=0)),
        ("cache.block_size", "0", "a power of two", partial(CacheConfig, block_size=0)),
        ("cache.block_size", "12", "a power of two", partial(CacheConfig, block_size=12)),
        ("cache.num_blocks", "1", "2 or more", partial(CacheConfig, num_blocks=1)),
        ("cache.memory_frac", "0.0", "in (0, 1]", partial(CacheConfig, memory_frac=0.0)),
        ("cache.memory_frac", "nan", "in (0, 1]", partial(CacheConfig, memory_frac=NAN)),
        ("scheduler.max_num_seqs", "0", "1 or more", partial(SchedulerConfig, max_num_seqs=0)),
        (
            "scheduler.max_num_batched_tokens",
            "63",
            "at least max_num_seqs (64)",
            partial(SchedulerConfig, max_num_seqs=64, max_num_batched_tokens=63),
        ),
        ("scheduler.max_num_waiting", "0", "1 or more", partial(SchedulerConfig, max_num_waiting=0)),
        ("slo.ttft_s", "0", "a positive number", partial(SloConfig, ttft_s=0)),
        ("slo.tpot_s", "nan", "a positive number", partial(SloConfig, tpot_s=NAN)),
        ("brownout.ways", "[3]", "any of [2, 4, 8]", partial(BrownoutConfig, ways=(3,))),
        ("brownout.ways", "[2, 2]", "no way twice", partial(BrownoutConfig, ways=(2, 2))),
        ("brownout.united", "''", "average", partial(BrownoutConfig, united="")),
        ("brownout.dimmer", "'none'", "united, paper", partial(BrownoutConfig, dimmer="none")),
        ("brownout.exempt_first", "-1", "0 or more layers", partial(BrownoutConfig, exempt_first=-1)),
        ("brownout.exempt_last", "-1", "0 or more layers", partial(BrownoutConfig, exempt_last=-1)),
        ("brownout.profile_repeats", "-1", "0 or more", partial(BrownoutConfig, profile_repeats=-1)),
        ("device", "'tpu'", "auto, cpu, cuda", partial(EngineConfig, ModelConfig("m"), device="tpu")),
        ("attention", "'magic'", "auto, sdpa", partial(EngineConfig, ModelConfig("m"), attention="magic")),
        ("num_threads", "0", "1 or more", partial(EngineConfig, ModelConfig("m"), num_threads=0)),
        ("stream_interval_s", "-0.1", "0 or more", partial(EngineConfig, ModelConfig("m"), stream_interval_s=-0.1)),
    ],
)
def test_a_bad_value_is_one_sentence(key: str, value: str, allowed: str, make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as refusal:
        make()
    sentence = str(refusal.value)
    assert sentence.startswith(f"{key} is {value}; allowed: ")
    assert allowed in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ModelConfig("/models/qwen"), "qwen"),
        (ModelConfig("/models/qwen/"), "qwen"),
        (ModelConfig("/models/qwen", name="chat"), "chat"),
    ],
)
def test_served_name(model: ModelConfig, name: str) -> None:
    assert model.served_name == name
