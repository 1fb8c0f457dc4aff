"""The small fused kernels and paged decode attention against their plain torch references."""

from __future__ import annotations

import pytest
import torch

from engine.attention.paged_decode import TILE_TOKENS, paged_decode, plan
from engine.attention.sdpa import SdpaAttention
from engine.batch import AttentionMetadata
from engine.kv_cache.storage import KvStorage
from engine.layers import embedding, fused, rotary
from engine.layers.fused_heads import FusedHeadNorm
from engine.layers.fused_linear import FusedLinear, SplitLinear, launch_linear
from engine.layers.linear import Linear, silu_and_mul
from engine.layers.norm import HeadNorm, RmsNorm
from engine.models.spec import ModelSpec

pytestmark = pytest.mark.gpu


def draw(*shape: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def tiny_spec(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelSpec:
    return ModelSpec(
        architecture="Qwen2MoeForCausalLM", num_layers=2, hidden_size=64, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=128, num_experts=4, num_experts_per_token=2,
        expert_size=32, shared_expert_size=32, norm_topk_prob=False, qkv_bias=True, rope_theta=1e4,
        rms_norm_eps=1e-6, tie_word_embeddings=False, max_position=512, dtype="float32",
    )  # fmt: skip


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_embedding_and_rotation_of_a_step(kernel_device: torch.device, index: torch.dtype) -> None:
    table = draw(40, 96, device=kernel_device, dtype=torch.bfloat16)
    angles = rotary.RotaryEmbedding(24, 64, 1e4, kernel_device)
    token_ids, positions = torch.tensor([[7, 0, 39, 7], [0, 63, 5, 1]], dtype=index, device=kernel_device)
    for twin in (embedding, fused):
        dimmed_pairs = torch.full((4,), 3, device=kernel_device)
        x, cos, sin = twin.embed(token_ids, positions, table, angles, dimmed_pairs)
        assert torch.equal(x, table[token_ids.long()])
        assert torch.equal(cos, angles.cos[positions.long()])
        assert torch.equal(sin, angles.sin[positions.long()])
        assert not dimmed_pairs.any()


def test_norm_with_residual_and_a_stack_of_addends(kernel_device: torch.device) -> None:
    x, stack = draw(5, 96, device=kernel_device), draw(3, 5, 96, device=kernel_device, seed=1)
    weight = draw(96, device=kernel_device, seed=2)
    reference, norm = RmsNorm(weight, 1e-6), fused.FusedRmsNorm(weight, 1e-6)
    torch.testing.assert_close(norm(x), reference(x))
    torch.testing.assert_close(norm.add(x, stack[0]), reference.add(x, stack[0]))
    torch.testing.assert_close(norm.add(x, stack), reference.add(x, stack.sum(0)))


def test_rotation_writes_the_cache_and_returns_queries(kernel_device: torch.device) -> None:
    spec = tiny_spec(num_heads=4, num_kv_heads=2, head_dim=32)
    pools = [KvStorage(spec, 6, 4, torch.float32, kernel_device) for _ in range(2)]
    qkv = draw(5, spec.q_size + 2 * spec.kv_size, device=kernel_device)
    slots = torch.tensor([7, 23, 4, 11, 12], device=kernel_device)
    cos, sin = rotary.RotaryEmbedding(32, 512, 1e4, kernel_device).tables(
        torch.tensor([0, 5, 511, 3, 77], device=kernel_device)
    )
    queries = [
        twin.rotate_and_store(qkv.clone(), cos, sin, spec.num_heads, slots, kv, 1)
        for twin, kv in zip((rotary, fused), pools, strict=True)
    ]
    torch.testing.assert_close(queries[1], queries[0])
    torch.testing.assert_close(pools[1].keys, pools[0].keys)
    torch.testing.assert_close(pools[1].values, pools[0].values)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 32), (32, 4, 128), (7, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_heads(
    kernel_device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    size = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = draw(5, size, device=kernel_device, dtype=dtype)
    weights = [1 + draw(head_dim, device=kernel_device, seed=seed, dtype=dtype) / 4 for seed in (1, 2)]
    expected = HeadNorm(*weights, num_heads, num_kv_heads, 1e-6)(qkv)
    normed = FusedHeadNorm(*weights, num_heads, num_kv_heads, 1e-6)(qkv.clone())
    torch.testing.assert_close(normed, expected)
    values = num_kv_heads * head_dim
    assert torch.equal(normed[:, -values:], qkv[:, -values:])


def test_gated_activation(kernel_device: torch.device) -> None:
    gate_up, share_logits = draw(5, 2 * 40, device=kernel_device), draw(5, device=kernel_device, seed=1)
    expected = silu_and_mul(gate_up) * share_logits.sigmoid()[:, None]
    torch.testing.assert_close(fused.silu_and_mul_gated(gate_up, share_logits), expected)


@pytest.mark.parametrize("num_rows", [1, 5, 64, 100])
@pytest.mark.parametrize(("size", "depth"), [(40, 96), (300, 512), (24, 1408)])
def test_linear_of_few_rows(kernel_device: torch.device, num_rows: int, size: int, depth: int) -> None:
    x, weight = draw(num_rows, depth, device=kernel_device), draw(2 * size, depth, device=kernel_device, seed=1)
    bias, logits = draw(2 * size, device=kernel_device, seed=2), draw(num_rows, device=kernel_device, seed=3)
    expected = Linear(weight, bias)(x)
    torch.testing.assert_close(FusedLinear(weight, bias)(x), expected, rtol=1e-4, atol=1e-4)
    addends = SplitLinear(weight, bias)(x)
    torch.testing.assert_close(addends.sum(0), expected, rtol=1e-4, atol=1e-4)
    assert addends.dtype is torch.float32
    gated = torch.full((1, num_rows, size), float("nan"), device=kernel_device)
    launch_linear(x, weight, gated, gated=True)
    torch.testing.assert_close(gated[0], silu_and_mul(x @ weight.t()), rtol=1e-4, atol=1e-3)
    scaled = torch.full((3, num_rows, 2 * size), float("nan"), device=kernel_device)
    launch_linear(x, weight, scaled, row_logits=logits)
    torch.testing.assert_close(scaled.sum(0), x @ weight.t() * logits.sigmoid()[:, None], rtol=1e-4, atol=1e-4)


def test_argmax_takes_the_first_of_equals(kernel_device: torch.device) -> None:
    logits = draw(3, 20_000, device=kernel_device, dtype=torch.bfloat16)
    logits[0, [9_000, 19_999]] = 50
    logits[1, 0] = 50
    logits[2, [100, 101]] = 50
    chosen = torch.zeros(3, dtype=torch.int64, device=kernel_device)
    newest = torch.full((5,), -1, dtype=torch.int32, device=kernel_device)
    fused.choose_likeliest(logits, chosen, newest, torch.tensor([4, 0, 2], device=kernel_device))
    assert chosen.tolist() == [9_000, 0, 100]
    assert newest.tolist() == [0, -1, 100, -1, 9_000]


@pytest.mark.parametrize("num_parts", [5, 6, 9, 40])
def test_a_decode_plan_covers_every_context_with_the_least_limit(kernel_device: torch.device, num_parts: int) -> None:
    lens = (1, 63, 64, 129, 1000)
    planned = plan(torch.tensor(lens, dtype=torch.int32, device=kernel_device), 2, num_parts)
    tiles = [-(-length // TILE_TOKENS) for length in lens]
    limit = min(n for n in range(1, max(tiles) + 1) if sum(-(-count // n) for count in tiles) <= num_parts)
    expected = [
        [sequence, start, min(start + limit * TILE_TOKENS, length), -(-count // limit)]
        for sequence, (length, count) in enumerate(zip(lens, tiles, strict=True))
        for start in range(0, length, limit * TILE_TOKENS)
    ]
    assert planned.parts[: len(expected)].tolist() == expected
    assert not planned.parts[len(expected) :, 3].any()
    firsts = [[row[0] for row in expected].index(sequence) for sequence in range(len(lens))]
    assert planned.first_parts.tolist() == firsts


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("num_parts", "num_warps"), [(5, 1), (8, 1), (20, 4)])
def test_paged_decode_equals_sdpa(
    kernel_device: torch.device, num_heads: int, num_kv_heads: int, block_size: int, num_parts: int, num_warps: int
) -> None:
    lens = (1, 63, 64, 129, 200)
    width = -(-max(lens) // block_size)
    num_blocks = len(lens) * width + 1
    keys = draw(num_blocks, block_size, num_kv_heads, 64, device=kernel_device, seed=1)
    values = draw(num_blocks, block_size, num_kv_heads, 64, device=kernel_device, seed=2)
    table = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(0)).reshape(len(lens), width)
    metadata = AttentionMetadata(
        num_decodes=len(lens),
        query_lens=(1,) * len(lens),
        context_lens=lens,
        prefill_starts_dev=torch.zeros(1, dtype=torch.int32, device=kernel_device),
        context_lens_dev=torch.tensor(lens, dtype=torch.int32, device=kernel_device),
        block_table=table.int().to(kernel_device),
        slot_mapping=torch.zeros(len(lens), dtype=torch.int64, device=kernel_device),
    )
    queries = draw(len(lens), num_heads, 64, device=kernel_device)
    expected = SdpaAttention().decode(queries, keys, values, metadata)
    planned = plan(metadata.context_lens_dev, num_kv_heads, num_parts)
    if kernel_device.type == "cuda":
        torch.cuda.synchronize()  # nothing may start right behind the plan
    for _ in range(2):  # the counts of parts that arrived must be back at zero for the second
        out = paged_decode(queries, keys, values, metadata.block_table, planned, num_warps)
        torch.testing.assert_close(out, expected)
