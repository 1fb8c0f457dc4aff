"""Text as it arrives must add up to the text decoded at once, and stop strings must be found wherever they fall."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenize import IncrementalDetokenizer
from engine.text.tokenizer import Tokenizer, load_tokenizer
from tests.models import DEMO_MODEL

IM_END = 4095


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


def stream(tokenizer, ids, stop=(), include_stop=False, min_tokens=0) -> tuple[list[str], str | None]:
    """The pieces that one token at a time shows, the flushed rest last, and the stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, tuple(stop), include_stop, min_tokens)
    pieces, matched = [], None
    for token_id in ids:
        piece, matched = detokenizer.append([token_id])
        pieces.append(piece)
        if matched is not None:
            break
    return [*pieces, detokenizer.flush()], matched


def characters(tokenizer, text: str) -> list[int]:
    """``text`` as one token per byte."""
    by_byte = ids_by_byte(tokenizer)
    return [by_byte[byte] for byte in text.encode()]


def ids_by_byte(tokenizer) -> dict[int, int]:
    return {tokenizer.token_bytes(i)[0]: i for i in range(4093) if len(tokenizer.token_bytes(i)) == 1}


def reference_stop(text: str, stop: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Read character by character; the first character that completes any stop string ends the text."""
    for end in range(1, len(text) + 1):
        completed = [s for s in stop if text[:end].endswith(s)]
        if completed:
            longest = max(completed, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@given(ids=st.lists(st.integers(0, 4200), max_size=60))
@settings(deadline=None, derandomize=True)
def test_pieces_add_up_for_any_ids(tokenizer, ids):
    assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids)


@given(text=st.text(st.sampled_from("aé中😀👩\u200d\ufffd \n"), max_size=20), size=st.integers(1, 7))
@settings(deadline=None, derandomize=True)
def test_pieces_add_up_for_split_characters(tokenizer, text, size):
    ids = characters(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer, (), False, 0)
    shown = "".join(detokenizer.append(ids[i : i + size])[0] for i in range(0, len(ids), size))
    assert shown == text
    assert detokenizer.flush() == ""


@given(
    text=st.text(st.sampled_from("ab😀"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab😀"), min_size=1, max_size=5), max_size=3),
    include_stop=st.booleans(),
    whole_tokens=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_stop_strings_match_the_reference(tokenizer, text, stop, include_stop, whole_tokens):
    ids = tokenizer.encode(text) if whole_tokens else characters(tokenizer, text)
    pieces, matched = stream(tokenizer, ids, stop, include_stop)
    assert ("".join(pieces), matched) == reference_stop(text, stop, include_stop)


def test_an_emoji_appears_whole(tokenizer):
    pieces, _ = stream(tokenizer, characters(tokenizer, "a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_a_dangling_character_is_replaced_at_the_end(tokenizer):
    ids = characters(tokenizer, "a😀")[:-1]
    pieces, _ = stream(tokenizer, ids)
    assert pieces == ["a", "", "", "", "\ufffd"]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_invalid_bytes_do_not_hold_back_what_follows(tokenizer):
    by_byte = ids_by_byte(tokenizer)
    pieces, _ = stream(tokenizer, [by_byte[0xFF]] * 3 + [by_byte[ord("a")]])
    assert pieces == ["\ufffd", "\ufffd", "\ufffd", "a", ""]


def test_text_that_may_begin_a_stop_string_waits(tokenizer):
    ids = characters(tokenizer, "x ENDING y END z")
    pieces, matched = stream(tokenizer, ids, stop=["END "])
    assert pieces[:7] == ["x", " ", "", "", "", "ENDI", "N"]
    assert "".join(pieces) == "x ENDING y "
    assert matched == "END "


def test_text_after_a_stop_string_is_dropped(tokenizer):
    ids = characters(tokenizer, "one.two")
    detokenizer = IncrementalDetokenizer(tokenizer, (".",), False, 0)
    assert detokenizer.append(ids) == ("one", ".")
    assert detokenizer.append(ids) == ("", ".")
    assert detokenizer.flush() == ""


def test_an_unfinished_stop_string_is_shown_at_the_end(tokenizer):
    pieces, matched = stream(tokenizer, characters(tokenizer, "abEN"), stop=["END"])
    assert pieces == ["a", "b", "", "", "EN"]
    assert matched is None


def test_the_first_of_two_stop_strings_wins(tokenizer):
    ids = tokenizer.encode("one two three")
    for stop in (["three", "two"], ["two", "three"]):
        pieces, matched = stream(tokenizer, ids, stop)
        assert ("".join(pieces), matched) == ("one ", "two")


@pytest.mark.parametrize(("min_tokens", "shown"), [(0, "a"), (2, "a"), (3, "a.b"), (4, "a.b"), (5, "a.b.c")])
def test_a_stop_string_counts_from_min_tokens_on(tokenizer, min_tokens, shown):
    pieces, matched = stream(tokenizer, characters(tokenizer, "a.b.c"), stop=["."], min_tokens=min_tokens)
    assert "".join(pieces) == shown
    assert (matched is None) == (min_tokens == 5)


def test_a_stop_string_may_begin_before_min_tokens(tokenizer):
    pieces, matched = stream(tokenizer, characters(tokenizer, "aaaa"), stop=["aa"], min_tokens=3)
    assert ("".join(pieces), matched) == ("a", "aa")


def test_special_tokens_are_silent(tokenizer):
    ids = [*characters(tokenizer, "a"), IM_END, *characters(tokenizer, "b")]
    assert stream(tokenizer, ids, stop=["<|im_end|>"]) == (["a", "", "b", ""], None)
    assert stream(tokenizer, ids, stop=["ab"])[1] == "ab"
