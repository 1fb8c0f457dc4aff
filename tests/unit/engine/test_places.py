"""The host's mirror of the batch, against the scheduler's and the block manager's own books."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.kv_cache.blocks import BlockManager
from engine.places import Places
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Sequence
from engine.types import GenerationRequest, Levels, SamplingParams

BLOCK_SIZE, NUM_PLACES = 4, 3


def test_tables_follow_sequences_through_chunks_decoding_and_new_tenants() -> None:
    blocks = BlockManager(30, BLOCK_SIZE, prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(NUM_PLACES, 7), blocks, max_model_len=40, vocab_size=100)
    places = Places(NUM_PLACES, 10, BLOCK_SIZE)
    for index in range(5):
        prompt = tuple(range(10 * index, 10 * index + 9))
        request = GenerationRequest(str(index), prompt, SamplingParams(max_tokens=3 + index))
        scheduler.add(Sequence(request, arrival_s=index))
    num_steps = 0
    while scheduler.has_work:
        batch = scheduler.schedule(0.0)
        rows = places.rows(batch, blocks)
        row = 0
        for number, item in enumerate(batch):
            table = blocks.block_ids(item.sequence.request_id)[: -(-item.end // BLOCK_SIZE)]
            assert rows.tables[number, : len(table)].tolist() == table
            assert rows.places[number] == item.sequence.place
            assert (rows.starts[number], rows.counts[number]) == (item.start, item.num_tokens)
            expected = item.sequence.token_ids[item.start : item.end]
            assert rows.token_ids[row : row + item.num_tokens].tolist() == expected
            row += item.num_tokens
        assert len(set(rows.places.tolist())) == len(rows.places)
        scheduler.launch(batch)
        scheduler.commit(batch, Levels())
        for item in batch:
            if item.samples:
                item.sequence.append(50)
                if item.sequence.num_generated == item.sequence.request.sampling.max_tokens:
                    scheduler.remove(item.sequence)
        num_steps += 1
    assert num_steps > 10


def test_a_token_under_way_is_named_by_its_place() -> None:
    blocks = BlockManager(30, BLOCK_SIZE, prefix_caching=False)
    scheduler = Scheduler(SchedulerConfig(NUM_PLACES, 16), blocks, max_model_len=40, vocab_size=100)
    places = Places(NUM_PLACES, 10, BLOCK_SIZE)
    sequence = Sequence(GenerationRequest("a", (1, 2, 3), SamplingParams(max_tokens=9)), arrival_s=0.0)
    scheduler.add(sequence)
    scheduler.launch(scheduler.schedule(0.0))
    assert places.rows(scheduler.schedule(0.0), blocks).token_ids.tolist() == [-1 - sequence.place]
