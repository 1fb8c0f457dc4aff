"""Finds the fastest tiles of the grouped products on this card: python -m engine.moe.tune MODEL_DIR

For each number of tokens every candidate is timed undimmed (tokens spread evenly over all experts) and dimmed (united
experts stand in for eight each); the best choice is written where engine.moe.tiles looks for it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from engine.models.registry import load_spec
from engine.models.spec import ModelSpec
from engine.moe.align import Alignment, align
from engine.moe.fused import ExpertSizes, launch_down, launch_gate_up
from engine.moe.tiles import MoeTiles, Tile, TileTable, tuned_path

TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192, 16384)
DECODE_TOKENS = 512  # up to here the weights' bytes decide, beyond the arithmetic
TOLERANCE = 1.005
DIMMED_WAY = 8
NUM_ROUTINGS = 8  # timed in turn, so that one launch finds nothing of the last in the cache
REPEATS = 5
MAX_SHARED_BYTES = 227 * 1024


def candidates(rows: int, products: int) -> list[Tile]:
    """Tiles worth compiling for ``rows`` pairs a tile; ``products`` weight matrices are read side by side."""
    is_hopper = torch.cuda.get_device_capability()[0] == 9
    if rows <= 32:
        space = itertools.product((64, 128), (64, 128, 256), (4, 8), (3, 4, 5), (False,))
    else:
        space = itertools.product((64, 128, 256), (32, 64), (4, 8), (3, 4), (False, True) if is_hopper else (False,))
    return [
        Tile(columns, depth, warps, stages, bulk_copy)
        for columns, depth, warps, stages, bulk_copy in space
        if (rows + products * columns) * depth * 2 * stages <= MAX_SHARED_BYTES
        and rows * columns * products <= 64 * 256 * (warps // 4)
        and (depth == 64 or not bulk_copy)
        and (rows > 32 or products * columns * depth * 2 * (stages - 1) >= 48 * 1024)
    ]


def row_choices(num_tokens: int) -> tuple[int, ...]:
    if num_tokens < 32:
        return (16,)
    return (32,) if num_tokens <= 256 else (32, 64) if num_tokens <= DECODE_TOKENS else (64, 128)


@dataclass(frozen=True, slots=True)
class _Problem:
    """One number of tokens on random weights: routings to all experts, then to united ones."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    ids: list[list[Tensor]]  # [undimmed, dimmed][routing]
    weights: Tensor
    sizes: ExpertSizes

    @staticmethod
    def draw(spec: ModelSpec, gate_up: Tensor, down: Tensor, num_tokens: int) -> _Problem:
        device = gate_up.device
        generator = torch.Generator(device).manual_seed(num_tokens)
        num_columns = spec.num_experts_per_token

        def routing(way: int, index: int) -> Tensor:
            """One of each ``way`` experts stands in for all of them, another one at the next ``index``."""
            scores = torch.rand(num_tokens, spec.num_experts, generator=generator, device=device)
            ids = scores.argsort(-1)[:, :num_columns] // way * way + index % way
            ids = ids.clamp(max=spec.num_experts - 1)
            earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)  # pairs that meet in one expert merge
            return torch.where(earlier, len(gate_up), ids).int()

        return _Problem(
            torch.randn(num_tokens, spec.hidden_size, generator=generator, device=device, dtype=gate_up.dtype),
            gate_up, down,
            [[routing(way, i) for i in range(NUM_ROUTINGS)] for way in (1, DIMMED_WAY)],
            torch.rand(num_tokens, num_columns, generator=generator, device=device),
            ExpertSizes(num_tokens, num_columns, len(gate_up), spec.hidden_size, spec.expert_size),
        )  # fmt: skip

    def times_ms(self, product: str, rows: int, tile: Tile) -> tuple[float, float]:
        """Milliseconds of one launch, undimmed and dimmed."""
        undimmed, dimmed = ([align(ids, len(self.gate_up), rows) for ids in routings] for routings in self.ids)
        return self._time_ms(product, rows, tile, undimmed), self._time_ms(product, rows, tile, dimmed)

    def _time_ms(self, product: str, rows: int, tile: Tile, alignments: list[Alignment]) -> float:
        sizes = self.sizes
        hidden = self.x.new_zeros(sizes.num_tokens * sizes.num_columns, sizes.expert_size)
        out = self.x.new_zeros(sizes.num_columns, sizes.num_tokens, sizes.hidden_size)

        def launch(alignment: Alignment) -> None:
            if product == "gate_up":
                launch_gate_up(self.x, self.gate_up, alignment, hidden, sizes, rows, tile)
            else:
                launch_down(hidden, self.down, self.weights, alignment, out, sizes, rows, tile)

        launch(alignments[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for alignment in alignments:
                launch(alignment)
        times = []
        for _ in range(REPEATS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / len(alignments))
        return median(times)


def best_tiles(problem: _Problem) -> tuple[MoeTiles, float]:
    """The best tiles for one number of tokens, and their undimmed milliseconds for both products.

    Of those within TOLERANCE of the fastest undimmed, the fastest dimmed.
    """
    measured = {
        (rows, product): dict(_measure(problem, product, rows))
        for rows in row_choices(problem.sizes.num_tokens)
        for product in ("gate_up", "down")
    }
    choices = []
    for rows in row_choices(problem.sizes.num_tokens):
        gate_up, down = (_best(measured[rows, product]) for product in ("gate_up", "down"))
        undimmed, dimmed = (measured[rows, "gate_up"][gate_up][i] + measured[rows, "down"][down][i] for i in (0, 1))
        choices.append((undimmed, dimmed, MoeTiles(rows, gate_up, down)))
    fastest = min(undimmed for undimmed, _, _ in choices)
    undimmed, _, tiles = min((c for c in choices if c[0] <= fastest * TOLERANCE), key=lambda c: c[1])
    return tiles, undimmed


def _best(times: dict[Tile, tuple[float, float]]) -> Tile:
    fastest = min(undimmed for undimmed, _ in times.values())
    return min(
        (tile for tile, (undimmed, _) in times.items() if undimmed <= fastest * TOLERANCE), key=lambda t: times[t][1]
    )


def _measure(problem: _Problem, product: str, rows: int) -> Iterable[tuple[Tile, tuple[float, float]]]:
    for tile in candidates(rows, 2 if product == "gate_up" else 1):
        try:
            yield tile, problem.times_ms(product, rows, tile)
        except OutOfResources:
            continue


def _compile_share(spec: ModelSpec, worker: int, num_workers: int) -> None:
    """Compile every ``num_workers``-th candidate into Triton's cache on disk."""
    device = torch.device("cuda")
    gate_up = torch.zeros(spec.num_experts, 2 * spec.expert_size, spec.hidden_size, dtype=torch.bfloat16, device=device)
    down = torch.zeros(spec.num_experts, spec.hidden_size, spec.expert_size, dtype=torch.bfloat16, device=device)
    problem = _Problem.draw(spec, gate_up, down, 1)
    jobs = [
        (product, rows, tile)
        for product, products in (("gate_up", 2), ("down", 1))
        for rows in sorted({rows for n in TOKEN_COUNTS for rows in row_choices(n)})
        for tile in candidates(rows, products)
    ]
    for product, rows, tile in jobs[worker::num_workers]:
        try:
            problem.times_ms(product, rows, tile)
        except OutOfResources:
            continue


def tune(spec: ModelSpec, num_workers: int) -> TileTable:
    """Tiles for each of TOKEN_COUNTS on the current card."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_compile_share, args=(spec, i, num_workers)) for i in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    device = torch.device("cuda")
    shape = (spec.num_experts, 2 * spec.expert_size, spec.hidden_size)
    gate_up = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    down = torch.empty(shape[0], shape[2], spec.expert_size, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    chosen = []
    for num_tokens in TOKEN_COUNTS:
        tiles, time_ms = best_tiles(_Problem.draw(spec, gate_up, down, num_tokens))
        print(f"{num_tokens:5d} tokens: {time_ms * 1e3:8.1f} us  {tiles}", flush=True)
        chosen.append(tiles)
    return TileTable(TOKEN_COUNTS, tuple(chosen))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.moe.tune", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", type=Path, help="a model directory; only its config.json is read")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, default=None, help="default: where the engine looks for it")
    arguments = parser.parse_args()
    spec = load_spec(arguments.model)
    card = torch.cuda.get_device_name()
    path = arguments.out or tuned_path(card, spec.num_experts, spec.hidden_size, spec.expert_size)
    tune(spec, arguments.workers).save(path)
    print(path)


if __name__ == "__main__":
    main()
