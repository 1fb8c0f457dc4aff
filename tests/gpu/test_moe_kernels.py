"""Each Triton kernel of the MoE layer against its plain torch reference."""

from __future__ import annotations

import pytest
import torch

from engine.batch import RowInfo
from engine.moe.align import align
from engine.moe.dimmer import Dimmer
from engine.moe.experts import PackedExperts
from engine.moe.fused import MIN_ROUTER_ROWS, run_experts
from engine.moe.fused_routing import Choice, choose, rewrite
from engine.moe.gate import Gate, Routing
from engine.moe.ladder import Ladder, Level
from engine.moe.tiles import MoeTiles, Tile
from engine.moe.united import consecutive_groups
from tests.united import map_united

pytestmark = pytest.mark.gpu

NUM_EXPERTS = 60
TOP_K = 4
HIDDEN = 96
WAYS = (2, 4, 8)
LADDER = Ladder((Level(), *(Level(way, share) for way in WAYS for share in (0.3, 0.7, 1.0))))
GROUPINGS = tuple(consecutive_groups(NUM_EXPERTS, way) for way in WAYS)
NUM_PACKED = NUM_EXPERTS + sum(len(grouping.groups) for grouping in GROUPINGS)


def make_rows(num_tokens: int, levels: tuple[int, int], device: torch.device, num_valid: int | None = None) -> RowInfo:
    """Half prefill, half decode rows; every fifth refuses to be dimmed."""
    rows = torch.arange(num_tokens, device=device)
    return RowInfo(
        phase=(rows >= num_tokens // 2).long(),
        exact=rows % 5 == 4,
        valid=rows < (num_tokens if num_valid is None else num_valid),
        levels=torch.tensor(levels, device=device),
    )


def random_choice(rows: RowInfo, seed: int, dimmer: Dimmer) -> Choice:
    device = rows.valid.device
    x, router = draw(len(rows.valid), HIDDEN, seed=seed, device=device), draw(64, HIDDEN, seed=1, device=device)
    return choose(x, router / 4, NUM_EXPERTS, TOP_K, False, NUM_PACKED, rows, dimmer)


def draw(*shape: int, seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def make_dimmer(device: torch.device, rank_by_count: bool = False) -> Dimmer:
    protected = torch.zeros(3, NUM_EXPERTS, dtype=torch.bool)
    protected[2, [5, 30]] = True
    dimmer = Dimmer(LADDER, NUM_PACKED - NUM_EXPERTS, protected, rank_by_count, device)
    map_united(dimmer.united_of, GROUPINGS)
    return dimmer


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
@pytest.mark.parametrize("normalise", [False, True])
def test_choice_equals_softmax_and_topk(kernel_device: torch.device, num_tokens: int, normalise: bool) -> None:
    x, router = draw(num_tokens, HIDDEN, seed=0, device=kernel_device), draw(64, HIDDEN, seed=1, device=kernel_device)
    rows = make_rows(num_tokens, (0, 0), kernel_device)
    choice = choose(x, router, NUM_EXPERTS, TOP_K, normalise, NUM_PACKED, rows, None)
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
    choice = choose(x, router, num_experts, top_k, True, num_experts, rows, None)
    expected = Gate(weight, top_k, True)(x)
    assert torch.equal(choice.routing.ids.long(), expected.ids)
    torch.testing.assert_close(choice.routing.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert (choice.shared_logits == 0).all()


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 200, 300])
@pytest.mark.parametrize("levels", [(0, 0), (0, 9), (3, 5), (9, 9), (6, 1)])
@pytest.mark.parametrize("rank_by_count", [False, True])
def test_rewrite_equals_the_dimmer(
    kernel_device: torch.device, num_tokens: int, levels: tuple[int, int], rank_by_count: bool
) -> None:
    dimmer = make_dimmer(kernel_device, rank_by_count)
    rows = make_rows(num_tokens, levels, kernel_device)
    choice = random_choice(rows, num_tokens, dimmer)
    routing = choice.routing
    expected = dimmer.rewrite(2, Routing(routing.ids.long(), routing.weights), rows)
    dimmed_pairs = torch.full((num_tokens,), 3, device=kernel_device)
    dimmed = rewrite(dimmer, 2, choice, rows, dimmed_pairs)
    assert torch.equal(dimmed.ids.long(), expected.routing.ids)
    torch.testing.assert_close(dimmed.weights, expected.routing.weights)
    assert torch.equal(dimmed_pairs - 3, expected.dimmed_pairs)


def test_level_0_leaves_the_weights_bit_identical(kernel_device: torch.device) -> None:
    rows = make_rows(64, (0, 0), kernel_device)
    dimmer = make_dimmer(kernel_device)
    choice = random_choice(rows, 0, dimmer)
    dimmed_pairs = torch.zeros(64, dtype=torch.int64, device=kernel_device)
    dimmed = rewrite(dimmer, 0, choice, rows, dimmed_pairs)
    assert torch.equal(dimmed.ids, choice.routing.ids)
    assert torch.equal(dimmed.weights, choice.routing.weights)
    assert dimmed_pairs.sum() == 0


def test_padding_rows_get_no_expert_and_count_for_nothing(kernel_device: torch.device) -> None:
    dimmer, results = make_dimmer(kernel_device), []
    for num_rows in (20, 48):
        rows = RowInfo(
            phase=torch.ones(num_rows, dtype=torch.int64, device=kernel_device),
            exact=torch.zeros(num_rows, dtype=torch.bool, device=kernel_device),
            valid=torch.arange(num_rows, device=kernel_device) < 20,
            levels=torch.tensor([0, 5], device=kernel_device),
        )
        dimmed_pairs = torch.zeros(num_rows, dtype=torch.int64, device=kernel_device)
        results.append(rewrite(dimmer, 0, random_choice(rows, 1, dimmer), rows, dimmed_pairs))
    short, padded = results
    assert torch.equal(short.ids, padded.ids[:20])
    torch.testing.assert_close(short.weights, padded.weights[:20])
    assert (padded.ids[20:] == NUM_PACKED).all()
    assert (padded.weights[20:] == 0).all()


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 200, 1000])
@pytest.mark.parametrize("tile_rows", [16, 64])
def test_align_sorts_stably_and_covers_each_pair_once(
    kernel_device: torch.device, num_tokens: int, tile_rows: int
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(0, NUM_PACKED + 1, (num_tokens, TOP_K), generator=generator, dtype=torch.int32)
    alignment = align(ids.to(kernel_device), NUM_PACKED, tile_rows)
    flat = ids.flatten().cpu()
    assert torch.equal(alignment.order.cpu().long(), flat.argsort(stable=True))
    covered = []
    for expert, first, end in alignment.tiles[: int(alignment.num_tiles)].tolist():
        assert end - first <= tile_rows
        assert (flat[alignment.order[first:end].long().cpu()] == expert).all()
        covered += range(first, end)
    assert sorted(covered) == list(range(len(flat)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bulk_copy", [False, True])
@pytest.mark.parametrize("tile_rows", [16, 32])
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
    run_experts(x, Routing(ids, weights), experts, tiles, out)
    wide = PackedExperts(experts.gate_up.double(), experts.down.double(), num_originals=6)
    expected = wide(x.double(), Routing(ids.long(), weights.double()))
    error = (out.double().sum(0) - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype is torch.bfloat16 else 1e-5)
