from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import BrownoutConfig, CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.kv_cache.storage import KvStorage
from engine.models.layout import checkpoint_tensors
from engine.models.registry import load_spec
from engine.moe.layer import MoeLayer
from engine.pool.kv_pool import CPU_KV_BYTES, run_largest_step
from engine.pool.slots import load_slot
from engine.runner import Runner
from engine.scheduler.scheduler import MAX_PROMPT_LOGITS
from engine.step_profile import UNPROFILED_STEP_S, profile_steps
from engine.weights.manifest import CheckpointError
from tests.models import FAMILIES, write_checkpoint, write_config

SCHEDULER = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("model"))


def config(
    model: Path,
    cache: CacheConfig = CacheConfig(num_blocks=9),  # noqa: B008 (frozen)
    brownout: BrownoutConfig = BrownoutConfig(),  # noqa: B008 (frozen)
    load_format: str = "random",
    **options: object,
) -> EngineConfig:
    return EngineConfig(
        ModelConfig(str(model), load_format=load_format, **options),  # type: ignore[arg-type]
        cache,
        SCHEDULER,
        brownout=brownout,
        device="cpu",
    )


def test_the_context_fits_into_the_pool_and_the_model(model: Path) -> None:
    assert load_slot(config(model)).max_model_len == 8 * 16
    assert load_slot(config(model, max_model_len=100)).max_model_len == 100
    assert load_slot(config(model, CacheConfig(num_blocks=200))).max_model_len == 512


def test_the_default_pool_holds_a_full_batch_as_far_as_memory_allows(model: Path) -> None:
    assert load_slot(config(model, CacheConfig())).kv.num_blocks == 4 * 512 // 16 + 1
    block_bytes = KvStorage.block_bytes(load_spec(model), 16, torch.float32)
    small = CacheConfig(memory_frac=10.5 * block_bytes / CPU_KV_BYTES)
    assert load_slot(config(model, small)).kv.num_blocks == 10
    with pytest.raises(ConfigError, match=r"cache\.memory_frac is .* holds no KV block"):
        load_slot(config(model, CacheConfig(memory_frac=1e-9)))


def test_the_memory_is_reported_at_start(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        slot = load_slot(config(model, CacheConfig()))
    num_bytes = sum(spec.num_elements for spec in checkpoint_tensors(slot.spec)) * 4
    line = next(message for message in caplog.messages if message.startswith("memory:"))
    assert f"weights {num_bytes / (1 << 30):.2f} GiB" in line
    assert f"in {4 * 32 + 1} blocks: {4 * 512} tokens, or 4.0 sequences of 512" in line


def test_the_largest_step_is_as_large_as_any_may_be(model: Path) -> None:
    """Its activations are what the pool leaves room for: all its tokens, the longest context, a step's most logits."""
    slot = load_slot(config(model))
    seen = []
    forward = slot.model.forward

    def forward_and_look(batch, kv):  # type: ignore[no-untyped-def]
        output = forward(batch, kv)
        seen.append((len(batch.token_ids), max(batch.attention.context_lens), len(output.logits)))
        return output

    slot.model.forward = forward_and_look  # type: ignore[method-assign]
    run_largest_step(config(model), slot.spec, slot.model, torch.float32, slot.device)
    for num_tokens in (1300, 2200):
        long_steps = replace(
            config(model), scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=num_tokens)
        )
        run_largest_step(long_steps, slot.spec, slot.model, torch.float32, slot.device)
    assert seen == [(32, 512, 32), (1300, 512, 1300), (2200, 512, MAX_PROMPT_LOGITS + 4)]


def test_block_bytes_are_what_storage_takes(model: Path) -> None:
    kv = load_slot(config(model)).kv
    taken = sum(tensor.numel() * tensor.element_size() for tensor in (kv.keys, kv.values))
    assert taken == 9 * KvStorage.block_bytes(load_spec(model), 16, torch.float32)


@pytest.mark.parametrize("pair", [(3, 0), (0, 12), (-1, 0)])
def test_a_protected_expert_must_exist(model: Path, pair: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"brownout\.protect has .* allowed: layers below 3, experts below 12"):
        load_slot(config(model, brownout=BrownoutConfig(ways=(2,), protect=(pair,))))


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path)
    load_slot(config(directory, load_format="safetensors"))
    write_config(directory, moe_intermediate_size=48)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight in .* has shape \(32, 64\)"):
        load_slot(config(directory, load_format="safetensors"))
    write_config(directory, num_experts=13)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.gate\.weight in .* has shape \(12, 64\)"):
        load_slot(config(directory, load_format="safetensors"))


def test_a_dense_model_has_one_level_and_refuses_ways(tmp_path: Path) -> None:
    directory = write_config(tmp_path, **FAMILIES["llama"])
    assert len(load_slot(config(directory)).ladder) == 1
    with pytest.raises(ConfigError, match=r"brownout\.ways is \[2, 4\], but .* is a dense model \(Llama"):
        load_slot(config(directory, brownout=BrownoutConfig(ways=(2, 4))))


def test_only_layers_with_experts_are_dimmed(tmp_path: Path) -> None:
    directory = write_config(tmp_path, **FAMILIES["qwen2_moe, dense layers"])
    slot = load_slot(config(directory, brownout=BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0)))
    layers = [layer.feed_forward for layer in slot.model.layers]
    assert [isinstance(layer, MoeLayer) and layer.dimmer is not None for layer in layers] == [False, True, False, False]
    assert slot.spec.pairs_per_token == 4
    with pytest.raises(ConfigError, match=r"brownout\.exempt_first is 2 .* a layer with experts remains"):
        load_slot(config(directory, brownout=BrownoutConfig(ways=(2,), exempt_first=2, exempt_last=0)))


def test_the_profile_covers_every_level_and_the_largest_step_and_keeps_no_slot_alive(model: Path) -> None:
    brownout = BrownoutConfig(ways=(2,), exempt_first=0, exempt_last=0, profile_repeats=1)
    slot = load_slot(config(model, brownout=brownout))
    measured = profile_steps(Runner(slot, 4), config(model, brownout=brownout), len(slot.ladder))
    assert measured.token_counts == (1, 4, 16, 32)
    assert measured.num_levels == len(slot.ladder) == 3
    assert all(0 < deep <= shallow for deep, shallow in zip(measured.times_s[-1], measured.times_s[0], strict=True))
    owned = [weakref.ref(part) for part in (slot, slot.model, slot.kv, slot.kv.keys)]
    del slot
    gc.collect()
    assert [ref() for ref in owned] == [None] * 4


def test_without_a_profile_a_guess_is_made(model: Path) -> None:
    unprofiled = config(model, brownout=BrownoutConfig(profile_repeats=0))
    guess = profile_steps(Runner(load_slot(unprofiled), 4), unprofiled, num_levels=3)
    assert [guess.predict_s(level, 99) for level in range(3)] == [UNPROFILED_STEP_S] * 3
