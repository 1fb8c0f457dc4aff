"""API keys: made once, kept only as a hash, compared in constant time. Pure but for the randomness of a new key.

A key is ``bsk_<id>_<secret>``. The id finds its record, so no lookup depends on the secret. The secret has 192 random
bits, so a plain SHA-256 cannot be reversed by guessing, and costs a request a microsecond.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

PREFIX = "bsk"
ID_BYTES = 6
SECRET_BYTES = 24
NO_DIGEST = "0" * 64  # what an unknown id is compared with, so that it takes no less time than a known one


class KeyFault(StrEnum):
    """Why a key does not open the door."""

    UNKNOWN = "unknown"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key. Times are Unix times; ``expires_at_s`` None: never."""

    key_id: str
    tenant: str
    sha256: str
    created_at_s: float
    expires_at_s: float | None = None
    label: str = ""  # for people: whose it is, where it is used


def new_key(tenant: str, now_s: float, lifetime_s: float | None = None, label: str = "") -> tuple[str, KeyRecord]:
    """A new key and its record; the key itself is nowhere kept."""
    key_id = secrets.token_hex(ID_BYTES)
    key = f"{PREFIX}_{key_id}_{secrets.token_hex(SECRET_BYTES)}"
    expires_at_s = None if lifetime_s is None else now_s + lifetime_s
    return key, KeyRecord(key_id, tenant, digest(key), now_s, expires_at_s, label)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


class KeyRing:
    """The keys that are valid now."""

    def __init__(self, records: Iterable[KeyRecord] = ()) -> None:
        self._records = {record.key_id: record for record in records}

    def __len__(self) -> int:
        return len(self._records)

    def find(self, key: str, now_s: float) -> KeyRecord | KeyFault:
        """The record of ``key`` as a client sent it."""
        parts = key.split("_", 2)
        record = self._records.get(parts[1]) if len(parts) == 3 else None
        matches = hmac.compare_digest(digest(key), record.sha256 if record else NO_DIGEST)
        if record is None or not matches:
            return KeyFault.UNKNOWN
        if record.expires_at_s is not None and now_s >= record.expires_at_s:
            return KeyFault.EXPIRED
        return record
