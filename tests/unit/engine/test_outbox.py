from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.outbox import Outbox
from engine.types import BrownoutUsage, FinishReason, RequestOutput, TokenLogprob, Usage

USAGE = Usage(1, 0, 3, BrownoutUsage())


def token(request_id: str, token_id: int, last: bool = False) -> RequestOutput:
    return RequestOutput(
        request_id,
        (token_id,),
        f"<{token_id}>",
        (TokenLogprob(token_id, -0.5),),
        FinishReason.LENGTH if last else None,
        usage=USAGE if last else None,
    )


def test_the_first_token_leaves_at_once_the_next_ones_together_the_last_at_once() -> None:
    outbox = Outbox(interval_s=1.0)
    assert outbox.collect([token("a", 1)], 0.0) == [token("a", 1)]
    assert outbox.collect([token("a", 2)], 0.3) == []
    assert outbox.collect([token("a", 3)], 0.6) == []
    (due,) = outbox.collect([token("a", 4)], 1.0)
    assert (due.token_ids, due.text) == ((2, 3, 4), "<2><3><4>")
    assert due.logprobs is not None
    assert [logprob.token_id for logprob in due.logprobs] == [2, 3, 4]
    assert outbox.collect([token("a", 5)], 1.1) == []
    (last,) = outbox.collect([token("a", 6, last=True)], 1.2)
    assert (last.token_ids, last.finish_reason, last.usage) == ((5, 6), FinishReason.LENGTH, USAGE)


def test_what_is_pending_leaves_in_time_though_its_stream_gains_nothing() -> None:
    outbox = Outbox(interval_s=1.0)
    outbox.collect([token("a", 1)], 0.0)
    outbox.collect([token("a", 2)], 0.5)
    assert outbox.collect([token("b", 9)], 1.0) == [token("b", 9), token("a", 2)]


def test_streams_leave_together() -> None:
    outbox = Outbox(interval_s=1.0)
    outbox.collect([token("a", 1)], 0.0)
    outbox.collect([token("b", 1)], 0.7)
    assert outbox.collect([token("a", 2), token("b", 2)], 0.9) == []
    assert outbox.collect([], 1.0) == [token("a", 2), token("b", 2)]


def test_an_interval_of_zero_holds_nothing_back() -> None:
    outbox = Outbox(interval_s=0.0)
    for token_id in range(5):
        assert outbox.collect([token("a", token_id)], token_id / 100) == [token("a", token_id)]


def test_without_logprobs_none_appear() -> None:
    outbox = Outbox(interval_s=1.0)
    outputs = [RequestOutput("a", (n,), str(n)) for n in range(3)]
    sent = [
        due for output, now_s in zip(outputs, (0.0, 0.1, 2.0), strict=True) for due in outbox.collect([output], now_s)
    ]
    assert [(due.token_ids, due.logprobs) for due in sent] == [((0,), None), ((1, 2), None)]


@given(
    steps=st.lists(st.tuples(st.floats(0.0, 0.5), st.sets(st.sampled_from("abc"))), max_size=40),
    interval_s=st.floats(0.0, 2.0),
)
def test_nothing_is_lost_doubled_or_reordered(steps: list[tuple[float, set[str]]], interval_s: float) -> None:
    outbox, now_s, next_id = Outbox(interval_s), 0.0, 0
    given_ids: dict[str, list[int]] = defaultdict(list)
    sent: dict[str, list[RequestOutput]] = defaultdict(list)
    ticks_s: list[float] = []

    def step(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            given_ids[output.request_id] += output.token_ids
        for due in outbox.collect(outputs, now_s):
            if sent[due.request_id] and not due.finished:
                ticks_s.append(now_s)
            sent[due.request_id].append(due)

    for step_s, names in steps:
        now_s += step_s
        next_id += len(names)
        step([token(name, next_id + index) for index, name in enumerate(sorted(names))])
    step([token(name, -1, last=True) for name in sorted(given_ids)])

    for name, ids in given_ids.items():
        assert [token_id for due in sent[name] for token_id in due.token_ids] == ids
        assert "".join(due.text for due in sent[name]) == "".join(f"<{token_id}>" for token_id in ids)
        assert [logprob.token_id for due in sent[name] for logprob in due.logprobs or ()] == ids
        assert [due.finished for due in sent[name]] == [False] * (len(sent[name]) - 1) + [True]
    gaps_s = [late - early for early, late in pairwise(ticks_s) if late != early]
    assert all(gap_s >= interval_s for gap_s in gaps_s)
