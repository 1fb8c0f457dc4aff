"""CUDA graphs of the step: whole decode steps, and the parts between two attentions of steps with prompts in them.

A step is padded to the next of a few sizes. Everything that changes between steps, the brownout levels included, is
read from fixed addresses, so a graph is captured once. Attention over prompts depends on lengths that the host knows
and runs between the parts; steps beyond the largest size run without graphs, bound by the card anyway. Those are padded
too, so that no new size meets a kernel that is not compiled yet.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.batch import ForwardBatch, StepRows
from engine.kv_cache.storage import KvStorage
from engine.layers.fused import choose_likeliest
from engine.models.decoder import Decoder, Hidden
from engine.static_inputs import Layout, StaticInputs
from engine.types import Levels

logger = logging.getLogger(__name__)

DECODE_SIZES = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, 513, 32))
ROW_SIZES = (
    *range(16, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256)
)  # fmt: skip
LARGE_SIZE_MULTIPLE = 256  # of steps beyond
WARM_UP_ROWS = 2048  # distance between the large sizes that are run at start, to compile their kernels
NUM_RESULT_BUFFERS = 2  # one is read by the host while the next step writes the other


Choose = Callable[[Tensor, Tensor], Tensor]  # logits [logit rows, V], newest tokens [N] -> the next ones [N]


class GraphStep:
    """A launched step. Its logits stay valid until the next launch."""

    def __init__(self, host_results: Tensor, done: torch.cuda.Event, rows: StepRows, logits: Tensor) -> None:
        self._host_results, self._done = host_results, done
        self._num_sequences, self._num_samples = len(rows.places), int(rows.samples.sum())
        self.logits = logits  # [logit rows, V]

    def token_ids(self) -> list[int]:
        """Choices of the sequences that sample; waits for the step."""
        self._done.synchronize()
        return self._host_results[0, : self._num_samples].tolist()

    def dimmed_pairs(self) -> list[int]:
        """Of every sequence; waits for the step."""
        self._done.synchronize()
        return self._host_results[1, : self._num_sequences].tolist()


class StepGraphs:
    """Captured at start. ``decode_graphs`` False: the decode attention cannot be captured, all steps run in parts."""

    def __init__(
        self, model: Decoder, kv: KvStorage, max_model_len: int, max_num_seqs: int, max_rows: int,
        decode_graphs: bool, device: torch.device,
    ) -> None:  # fmt: skip
        started_s = time.perf_counter()
        self.max_num_seqs = max_num_seqs
        self._model, self._kv, self._num_layers = model, kv, len(model.layers)
        max_rows = max(max_rows, max_num_seqs, ROW_SIZES[0])
        if max_rows > ROW_SIZES[-1]:
            max_rows = _rounded(max_rows)
        max_blocks = -(-max_model_len // kv.block_size)
        self._inputs = StaticInputs(max_rows, max_num_seqs, max_blocks, kv.block_size, device)
        self._results = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        self._host_results = [
            torch.zeros_like(self._results, device="cpu").pin_memory() for _ in range(NUM_RESULT_BUFFERS)
        ]
        self._turn = 0
        self._queries, self._attended, self._normed, self._logits = self._buffers(max_rows)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(priority=-1)  # small kernels of the main chain go before the shared expert's
        sequence_sizes = _sizes_up_to(max_num_seqs, DECODE_SIZES)
        self._decodes: dict[int, torch.cuda.CUDAGraph] = {}
        if decode_graphs:
            sizes = [size for size in sequence_sizes if size <= DECODE_SIZES[-1]]
            self._decodes = {size: self._capture([self._decode_of(size)], size, size)[0] for size in reversed(sizes)}
        row_sizes = [size for size in _sizes_up_to(max_rows, ROW_SIZES) if size <= ROW_SIZES[-1]]
        self._parts = {size: self._capture(self._parts_of(size), size, max_num_seqs) for size in reversed(row_sizes)}
        for size in range(ROW_SIZES[-1] + LARGE_SIZE_MULTIPLE, max_rows + 1, WARM_UP_ROWS):
            self._run_once(size)
        self._heads = {
            size: self._capture([self._head_of(size)], ROW_SIZES[0], max_num_seqs)[0]
            for size in reversed(sequence_sizes)
        }
        logger.info(
            "CUDA graphs: %d decode sizes, %d step sizes, captured in %.1f s",
            len(self._decodes), len(self._parts), time.perf_counter() - started_s,
        )  # fmt: skip

    @torch.inference_mode()
    def launch(self, rows: StepRows, levels: Levels, choose: Choose | None = None) -> GraphStep:
        """Begin a step behind those already launched. ``choose`` picks other tokens than the likeliest."""
        num_sequences = len(rows.places)
        if rows.num_decodes == num_sequences and num_sequences <= max(self._decodes, default=0):
            size = _padded(num_sequences, self._decodes)
            self._inputs.fill(rows, levels, size, size)
            self._decodes[size].replay()
            logits, layout = self._logits[:num_sequences], self._inputs.device_layout(size, size)
        else:
            run = self._run_parts if rows.num_rows <= max(self._parts) else self._run_whole
            layout = run(rows, levels)
            logits = self._run_head(rows)
        if choose is not None:
            num_samples = int(rows.samples.sum())
            token_ids = choose(logits, self._inputs.newest_of_samples(layout, num_samples))
            self._results[0, :num_samples] = token_ids
            self._inputs.newest[layout.sample_places[:num_samples]] = token_ids.int()
        self._turn = (self._turn + 1) % NUM_RESULT_BUFFERS
        host_results, done = self._host_results[self._turn], torch.cuda.Event()
        host_results.copy_(self._results, non_blocking=True)
        done.record()
        return GraphStep(host_results, done, rows, logits)

    def replay_decode(self, num_sequences: int) -> None:
        """Run a decode graph again on the inputs of the last launch, without waiting: for measurements."""
        self._decodes[_padded(num_sequences, self._decodes)].replay()

    # Decode steps

    def _decode_of(self, size: int) -> Callable[[], None]:
        layout = self._inputs.device_layout(size, size)

        def compute() -> None:
            hidden = self._model.hidden(self._inputs.batch(layout), self._kv, dimmed_pairs=self._results[1, :size])
            self._choose(hidden.normed, layout.sample_places)

        return compute

    def _choose(self, normed: Tensor, places: Tensor) -> None:
        logits = self._model.logits(normed, out=self._logits[: len(normed)])
        choose_likeliest(logits, self._results[0, : len(normed)], self._inputs.newest, places)

    # Steps in parts

    def _run_parts(self, rows: StepRows, levels: Levels) -> Layout[Tensor]:
        model, kv, num_rows = self._model, self._kv, rows.num_rows
        size = _padded(num_rows, self._parts)
        self._inputs.fill(rows, levels, size, self.max_num_seqs)
        layout = self._inputs.device_layout(size, self.max_num_seqs)
        batch = self._inputs.batch(layout, rows, levels)
        model.begin_step(batch)
        for index, graph in enumerate(self._parts[size]):
            graph.replay()
            if index < self._num_layers:
                self._attended[:num_rows] = model.attend(index, self._queries[:num_rows], batch, kv)
        return layout

    def _run_head(self, rows: StepRows) -> Tensor:
        """Choose tokens after the parts; returns the wanted logits."""
        num_samples, num_logits = int(rows.samples.sum()), int(rows.num_logits.sum())
        if num_samples:
            self._heads[_padded(num_samples, self._heads)].replay()
        if num_logits == num_samples:
            return self._logits[:num_samples]
        return self._model.logits(self._normed[torch.from_numpy(rows.logit_rows).to(self._normed.device)])

    def _parts_of(self, size: int) -> list[Callable[[], None]]:
        """The step but for attention: up to the first one, between two, and after the last."""
        model, kv, layout = self._model, self._kv, self._inputs.device_layout(size, self.max_num_seqs)
        state: dict[str, Any] = {}

        def begin() -> None:
            state["batch"] = self._inputs.batch(layout)
            state["hidden"], queries = model.begin(state["batch"], kv)
            self._queries[:size] = queries

        def advance(index: int) -> None:
            batch: ForwardBatch = state["batch"]
            state["hidden"], queries = model.advance(index, state["hidden"], self._attended[:size], batch, kv)
            if index + 1 < self._num_layers:
                self._queries[:size] = queries
                return
            self._keep(state.pop("hidden"), layout)

        return [begin, *(lambda index=index: advance(index) for index in range(self._num_layers))]

    def _keep(self, hidden: Hidden, layout: Layout[Tensor]) -> None:
        """Put down a step's last hidden states and its dimmed pairs."""
        self._normed[: len(hidden.normed)] = hidden.normed
        self._results[1].zero_().index_add_(0, layout.sequences, hidden.dimmed_pairs)

    # Steps without graphs

    def _run_whole(self, rows: StepRows, levels: Levels) -> Layout[Tensor]:
        """Beyond the largest captured size. Queries stay where they are, and at level 0 no dimmer runs."""
        model, kv, num_rows, size = self._model, self._kv, rows.num_rows, _rounded(rows.num_rows)
        self._inputs.fill(rows, levels, size, self.max_num_seqs)
        layout = self._inputs.device_layout(size, self.max_num_seqs)
        batch = self._inputs.batch(layout, rows, levels)
        model.begin_step(batch)
        hidden, queries = model.begin(batch, kv)
        for index in range(self._num_layers):
            attended = model.attend(index, queries[:num_rows], batch, kv)
            if num_rows < size:
                self._attended[:num_rows] = attended
                attended = self._attended[:size]
            hidden, queries = model.advance(index, hidden, attended, batch, kv)
        self._keep(hidden, layout)
        return layout

    @torch.inference_mode()
    def _run_once(self, num_rows: int) -> None:
        """Compiles the kernels of such a step, exact and dimmed."""
        layout = self._inputs.device_layout(num_rows, self.max_num_seqs)
        self._inputs.blank(layout)
        batch = self._inputs.batch(layout)
        for rows in (batch.rows, replace(batch.rows, host_levels=(0, 0))):
            batch = replace(batch, rows=rows)
            hidden, _ = self._model.begin(batch, self._kv)
            for index in range(self._num_layers):
                hidden, _ = self._model.advance(index, hidden, self._attended[:num_rows], batch, self._kv)
        torch.cuda.synchronize()

    # The choice of tokens

    def _head_of(self, size: int) -> Callable[[], None]:
        """The choice of tokens after a step in parts. The arrays of sequences stand at the same address in each."""
        layout = self._inputs.device_layout(ROW_SIZES[0], self.max_num_seqs)

        def compute() -> None:
            self._choose(self._normed[layout.sample_rows[:size]], layout.sample_places[:size])

        return compute

    @torch.inference_mode()
    def _buffers(self, max_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of a step in parts; attention's results and last hidden states of any step; logits."""
        layout = self._inputs.device_layout(1, self.max_num_seqs)
        self._inputs.blank(layout)
        hidden, queries = self._model.begin(self._inputs.batch(layout), self._kv)
        logits = self._model.logits(hidden.normed)
        attended, normed = (like.new_zeros(max_rows, *like.shape[1:]) for like in (queries, hidden.normed))
        queries = torch.zeros_like(attended[: ROW_SIZES[-1]])
        return queries, attended, normed, logits.new_zeros(self.max_num_seqs, logits.shape[1])

    # Capture

    @torch.inference_mode()
    def _capture(
        self, parts: list[Callable[[], None]], num_rows: int, num_sequences: int
    ) -> list[torch.cuda.CUDAGraph]:
        """One graph per part of a step of that size. The first run compiles the kernels."""
        self._inputs.blank(self._inputs.device_layout(num_rows, num_sequences))
        self._stream.wait_stream(torch.cuda.current_stream())
        graphs = []
        with torch.cuda.stream(self._stream):
            for part in parts:
                part()
            torch.cuda.synchronize()
            for part in parts:  # not torch.cuda.graph, which would empty the caches for each of hundreds of graphs
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool)
                part()
                graph.capture_end()
                graphs.append(graph)
        return graphs


def _sizes_up_to(largest: int, sizes: tuple[int, ...]) -> list[int]:
    """The sizes below ``largest``, doubled beyond the last, then ``largest`` itself."""
    chosen = [size for size in sizes if size < largest]
    beyond = sizes[-1] * 2
    while beyond < largest:
        chosen.append(beyond)
        beyond *= 2
    return [*chosen, largest]


def _rounded(num_rows: int) -> int:
    return -(-num_rows // LARGE_SIZE_MULTIPLE) * LARGE_SIZE_MULTIPLE


def _padded(count: int, sizes: dict[int, Any]) -> int:
    ordered = sorted(sizes)
    return ordered[bisect_left(ordered, count)]
