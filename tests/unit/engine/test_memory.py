"""What is left of a device becomes KV; what does not fit is refused in one sentence that says what would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig
from engine.memory import GIB, MemoryUse, check_weights_fit, plan_memory

BLOCK_BYTES = 3 << 20  # 16 tokens of Qwen1.5-MoE-A2.7B in bfloat16
USE = MemoryUse(50 * GIB, 27 * GIB, 2 * GIB, 3 * GIB)


def config(
    max_model_len: int | None = None, max_num_seqs: int = 256, num_blocks: int | None = None, memory_frac: float = 0.9
) -> EngineConfig:
    return EngineConfig(
        ModelConfig("model", max_model_len=max_model_len),
        CacheConfig(num_blocks=num_blocks, memory_frac=memory_frac),
        SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=8192),
    )


def test_kv_gets_its_share_of_what_weights_activations_and_graphs_leave() -> None:
    plan = plan_memory(config(), USE, BLOCK_BYTES, 8192)
    assert plan.num_blocks == int(45 * GIB * 0.9) // BLOCK_BYTES
    assert plan.max_model_len == 8192
    assert plan.describe() == (
        "memory: weights 27.00 GiB, activations 2.00 GiB, graphs 3.00 GiB set aside, "
        f"KV 40.50 GiB in 13824 blocks: {13823 * 16} tokens, or 27.0 sequences of 8192"
    )


def test_no_more_than_a_full_batch_can_use() -> None:
    assert plan_memory(config(max_num_seqs=2, max_model_len=1000), USE, BLOCK_BYTES, 8192).num_blocks == 2 * 63 + 1


@pytest.mark.parametrize("asked", [None, 512])
def test_a_context_that_does_not_fit_is_cut_only_if_nobody_asked_for_it(asked: int | None) -> None:
    use = MemoryUse(6 * GIB, 27 * GIB, 2 * GIB, 4 * GIB - 11 * BLOCK_BYTES)
    if asked is None:
        assert plan_memory(config(memory_frac=1.0), use, BLOCK_BYTES, 8192).max_model_len == 160
        return
    with pytest.raises(ConfigError) as refusal:
        plan_memory(config(asked, memory_frac=1.0), use, BLOCK_BYTES, 8192)
    words = (
        "model.max_model_len is 512",
        "0.10 GiB",
        "at most 160",
        "0.06 GiB more",
        "max_num_batched_tokens (now 8192",
    )
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("free_bytes", [GIB, 5 * GIB, 5 * GIB + BLOCK_BYTES])
def test_no_room_for_kv_names_what_would_fit(free_bytes: int) -> None:
    with pytest.raises(ConfigError, match=r"holds no KV block; allowed: .* GiB more memory, or a lower scheduler\.max"):
        plan_memory(config(), MemoryUse(free_bytes, 27 * GIB, 2 * GIB, 3 * GIB), BLOCK_BYTES, 8192)


def test_a_given_number_of_blocks_is_taken_or_refused() -> None:
    plan = plan_memory(config(num_blocks=100, max_model_len=4000), USE, BLOCK_BYTES, 8192)
    assert (plan.num_blocks, plan.num_tokens, plan.max_model_len) == (100, 99 * 16, 99 * 16)
    with pytest.raises(
        ConfigError, match=r"cache\.num_blocks is 20000, .* 45\.00 GiB are free; allowed: at most 15360"
    ):
        plan_memory(config(num_blocks=20000), USE, BLOCK_BYTES, 8192)


def test_weights_that_do_not_fit() -> None:
    check_weights_fit(27 * GIB, 28 * GIB, "bfloat16", "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"take 27\.00 GiB in bfloat16, and NVIDIA A100 has 20\.00 GiB free"):
        check_weights_fit(27 * GIB, 20 * GIB, "bfloat16", "NVIDIA A100")


@given(
    free_bytes=st.integers(0, 100 * GIB),
    activations_bytes=st.integers(0, 20 * GIB),
    memory_frac=st.floats(0.01, 1),
    asked=st.none() | st.integers(1, 8192),
)
def test_a_plan_never_exceeds_its_memory(
    free_bytes: int, activations_bytes: int, memory_frac: float, asked: int | None
) -> None:
    use = MemoryUse(free_bytes, 0, activations_bytes)
    try:
        plan = plan_memory(config(asked, memory_frac=memory_frac), use, BLOCK_BYTES, 8192)
    except ConfigError:
        return
    assert plan.num_blocks * BLOCK_BYTES + activations_bytes <= free_bytes
    assert 0 < plan.max_model_len <= plan.num_tokens
    assert plan.max_model_len == asked or asked is None
