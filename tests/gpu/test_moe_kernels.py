"""Each Triton kernel of the MoE layer against its plain torch reference."""

from __future__ import annotations

import pytest
import torch

from engine.batch import RowInfo
from engine.moe.align import align
from engine.moe.experts import PackedExperts
from engine.moe.fused import HALVED_ROWS, MIN_ROUTER_ROWS, run_experts
from engine.moe.fused_routing import choose
from engine.moe.gate import Gate, Routing
from engine.moe.tiles import MoeTiles, Tile

pytestmark = pytest.mark.gpu

NUM_EXPERTS = 60
TOP_K = 4
HIDDEN = 96
NUM_PACKED = NUM_EXPERTS + 53


def make_rows(num_tokens: int, levels: tuple[int, int], device: torch.device, num_valid: int | None = None) -> RowInfo:
    """Half prefill, half decode rows; every fifth refuses to be dimmed."""
    rows = torch.arange(num_tokens, device=device)
    return RowInfo(
        phase=(rows >= num_tokens // 2).long(),
        exact=rows % 5 == 4,
        valid=rows < (num_tokens if num_valid is None else num_valid),
        levels=torch.tensor(levels, device=device),
    )


def draw(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("normalise", [False, True])
def test_choice_equals_softmax_and_topk(kernel_device: torch.device, num_tokens: int, normalise: bool) -> None:
    x, router = draw(num_tokens, HIDDEN, seed=0, device=kernel_device), draw(64, HIDDEN, seed=1, device=kernel_device)
    rows = make_rows(num_tokens, (0, 0), kernel_device)
    choice = choose(x, router, NUM_EXPERTS, TOP_K, normalise, NUM_PACKED, rows, None, 0)
    expected = Gate(router[:NUM_EXPERTS], TOP_K, normalise)(x)
    assert torch.equal(choice.routing.ids.long(), expected.ids)
    torch.testing.assert_close(choice.routing.weights, expected.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(choice.shared_logits, x @ router[NUM_EXPERTS], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 4), (128, 8)])
def test_choice_without_a_shared_expert(kernel_device: torch.device, num_experts: int, top_k: int) -> None:
    x, weight = draw(20, HIDDEN, seed=0, device=kernel_device), draw(num_experts, HIDDEN, seed=1, device=kernel_device)
    padding = max(MIN_ROUTER_ROWS - num_experts, 0)
    router = torch.nn.functional.pad(weight, (0, 0, 0, padding))
    rows = make_rows(20, (0, 0), kernel_device)
    choice = choose(x, router, num_experts, top_k, True, num_experts, rows, None, 0)
    expected = Gate(weight, top_k, True)(x)
    assert torch.equal(choice.routing.ids.long(), expected.ids)
    torch.testing.assert_close(choice.routing.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert (choice.shared_logits == 0).all()


def test_padding_rows_get_no_expert(kernel_device: torch.device) -> None:
    rows = make_rows(48, (0, 0), kernel_device, num_valid=20)
    x, router = draw(48, HIDDEN, seed=0, device=kernel_device), draw(64, HIDDEN, seed=1, device=kernel_device)
    routing = choose(x, router, NUM_EXPERTS, TOP_K, False, NUM_PACKED, rows, None, 0).routing
    assert (routing.ids[:20] < NUM_EXPERTS).all()
    assert (routing.ids[20:] == NUM_PACKED).all()
    assert (routing.weights[20:] == 0).all()


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 200, 1000])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_align_sorts_stably_and_covers_each_pair_once(
    kernel_device: torch.device, num_tokens: int, tile_rows: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(0, NUM_PACKED + 1, (num_tokens, TOP_K), generator=generator, dtype=torch.int32)
    load = torch.ones(NUM_PACKED + 3, dtype=torch.int64, device=kernel_device)
    alignment = align(ids.to(kernel_device), NUM_PACKED, tile_rows, load)
    flat = ids.flatten().cpu()
    counts = flat.bincount(minlength=NUM_PACKED + 1)[:NUM_PACKED]
    assert (load - 1).tolist() == [*counts.tolist(), 0, 0, int((counts > 0).sum())]
    assert torch.equal(alignment.order.cpu().long(), flat.argsort(stable=True))
    covered = []
    for expert, first, end in alignment.tiles[: int(alignment.num_tiles)].tolist():
        assert end - first <= tile_rows
        assert (flat[alignment.order[first:end].long().cpu()] == expert).all()
        covered += range(first, end)
    assert sorted(covered) == list(range(len(flat)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bulk_copy", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 32, 64])
@pytest.mark.parametrize(("num_tokens", "hidden", "size"), [(1, 64, 32), (19, 64, 48), (70, 96, 32)])
def test_experts_equal_the_plain_computation(
    kernel_device: torch.device, dtype: torch.dtype, bulk_copy: bool, tile_rows: int,
    num_tokens: int, hidden: int, size: int,
) -> None:  # fmt: skip
    if bulk_copy and kernel_device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs a Hopper")
    if dtype is torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 product")
    generator = torch.Generator().manual_seed(num_tokens)

    def draw_here(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(kernel_device, dtype)

    num_packed = 9
    experts = PackedExperts(
        draw_here(num_packed, 2 * size, hidden), draw_here(num_packed, hidden, size), num_originals=6
    )
    x = draw_here(num_tokens, hidden)
    ids = torch.rand(num_tokens, num_packed + 1, generator=generator).argsort(-1)[:, :3].int().to(kernel_device)
    weights = torch.rand(num_tokens, 3, generator=generator).to(kernel_device)
    weights[ids == num_packed] = 0
    tiles = MoeTiles(tile_rows, Tile(32, 32, 4, 2, bulk_copy), Tile(64, 32, 4, 2, bulk_copy))
    out = torch.full((3, num_tokens, hidden), float("nan"), dtype=dtype, device=kernel_device)
    run_experts(x, Routing(ids, weights), align(ids, len(experts.gate_up), tiles.rows), experts, tiles, out)
    wide = PackedExperts(experts.gate_up.double(), experts.down.double(), num_originals=6)
    expected = wide(x.double(), Routing(ids.long(), weights.double()))
    error = (out.double().sum(0) - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype is torch.bfloat16 else 1e-5)


def test_a_half_full_tile_changes_no_bit(gpu: torch.device) -> None:
    """An expert's result must not depend on how many other pairs a level sends to it."""
    rows = HALVED_ROWS
    generator = torch.Generator().manual_seed(0)
    gate_up, down, x = (
        torch.randn(*shape, generator=generator).to(gpu, torch.bfloat16)
        for shape in ((2, 512, 256), (2, 256, 256), (rows, 256))
    )
    experts, tile = PackedExperts(gate_up, down, num_originals=2), Tile(64, 64, 4, 3)
    outs = []
    for num_first in (rows // 2, rows):
        ids = (torch.arange(rows, device=gpu) >= num_first).int()[:, None]
        out = torch.full((1, rows, 256), float("nan"), dtype=torch.bfloat16, device=gpu)
        routing = Routing(ids, torch.ones(rows, 1, device=gpu))
        run_experts(x, routing, align(ids, len(experts.gate_up), rows), experts, MoeTiles(rows, tile, tile), out)
        outs.append(out[0, : rows // 2])
    assert torch.equal(*outs)
