"""A key opens the door exactly as long as its record says; what is kept of it opens nothing."""

from __future__ import annotations

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.admission import keys
from cluster.admission.keys import KeyFault, KeyRecord, KeyRing, digest, new_key


def test_a_key_finds_its_own_record() -> None:
    made = [new_key(f"tenant-{number}", 0.0) for number in range(50)]
    ring = KeyRing(record for _, record in made)
    assert [ring.find(key, 1.0) for key, _ in made] == [record for _, record in made]


def test_the_record_holds_nothing_that_opens() -> None:
    key, record = new_key("acme", 0.0, label="laptop")
    secret = key.rsplit("_", 1)[1]
    assert secret not in repr(record)
    ring = KeyRing([record])
    assert ring.find(record.sha256, 0.0) is KeyFault.UNKNOWN
    assert ring.find(f"bsk_{record.key_id}_{record.sha256}", 0.0) is KeyFault.UNKNOWN


KEY = "bsk_0011aabbccdd_5f1d7a84db00d2fce00b31a7fc73224f"


@given(place=st.integers(0, len(KEY) - 1), other=st.characters(), more=st.text(min_size=1))
def test_no_other_text_opens(place: int, other: str, more: str) -> None:
    ring = KeyRing([KeyRecord("0011aabbccdd", "acme", digest(KEY), 0.0)])
    assert ring.find(KEY, 0.0) is not KeyFault.UNKNOWN
    for guess in (KEY[:place] + other + KEY[place + 1 :], KEY[:place], KEY + more, more):
        assert ring.find(guess, 0.0) is KeyFault.UNKNOWN or guess == KEY


def test_a_key_expires_at_its_time() -> None:
    key, record = new_key("acme", 100.0, lifetime_s=60.0)
    ring = KeyRing([record])
    assert ring.find(key, 159.9) == record
    assert ring.find(key, 160.0) is KeyFault.EXPIRED


def test_every_look_compares_whole_digests_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def spy(given: str, kept: str) -> bool:
        compared.append((len(given), len(kept)))
        return compare(given, kept)

    monkeypatch.setattr(keys.hmac, "compare_digest", spy)
    key, record = new_key("acme", 0.0)
    for guess in (key, f"bsk_{record.key_id}_x", "bsk_unknown_x", "nonsense"):
        KeyRing([record]).find(guess, 0.0)
    assert compared == [(64, 64)] * 4
