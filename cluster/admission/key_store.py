"""Where API keys are kept: a JSON file, or Redis. Blocking: for the CLI, and for a thread of the ingress.

In Redis all keys of an application share one hash tag:

    {<prefix>:admission}:keys           key_id |-> KeyRecord as JSON
    {<prefix>:admission}:keys_version   counts changes; absent: never written, or Redis has lost its data
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol, cast

import redis
from pydantic import TypeAdapter, ValidationError
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.admission.config import AdmissionSection
from cluster.admission.keys import KeyRecord
from cluster.errors import ClusterError

TIMEOUT_S = 1.0

_RECORD = TypeAdapter(KeyRecord)
_RECORDS = TypeAdapter(list[KeyRecord])


class KeyStoreError(ClusterError):
    """Keys cannot be read or written, in one sentence."""


class KeyStore(Protocol):
    """All methods raise KeyStoreError."""

    def load(self) -> list[KeyRecord] | None:
        """All keys, oldest first; None: none were ever kept here."""
        ...

    def add(self, record: KeyRecord) -> None: ...

    def remove(self, key_id: str) -> bool:
        """Whether there was such a key."""
        ...


class FileKeyStore:
    """A JSON list, readable by its owner only; written as a whole, one writer at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[KeyRecord] | None:
        try:
            return _sorted(_RECORDS.validate_json(self._path.read_bytes()))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise KeyStoreError(f"{self._path} is not a list of keys: {_first(error)}") from error
        except OSError as error:
            raise KeyStoreError(f"{self._path} cannot be read: {error.strerror}") from error

    def add(self, record: KeyRecord) -> None:
        self._change(lambda records: [*records, record])

    def remove(self, key_id: str) -> bool:
        before, after = self._change(lambda records: [record for record in records if record.key_id != key_id])
        return after < before

    def _change(self, change: Callable[[list[KeyRecord]], list[KeyRecord]]) -> tuple[int, int]:
        """Number of keys before and after."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path.with_name(self._path.name + ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = self.load() or []
                after = change(before)
                _replace(self._path, _RECORDS.dump_json(after, indent=2) + b"\n")
        except OSError as error:
            raise KeyStoreError(f"{self._path} cannot be written: {error.strerror}") from error
        return len(before), len(after)


class RedisKeyStore:
    """One hash; ``key_prefix`` is the application's."""

    def __init__(self, redis_url: str, key_prefix: str) -> None:
        self._client = redis.Redis.from_url(
            redis_url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
        tag = admission_tag(key_prefix)
        self._keys, self._version = f"{tag}:keys", f"{tag}:keys_version"

    def load(self) -> list[KeyRecord] | None:
        try:
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.get(self._version)
                pipeline.hgetall(self._keys)
                version, rows = pipeline.execute()
            if version is None:
                return None
            return _sorted(_RECORD.validate_json(row) for row in cast(Mapping[bytes, bytes], rows).values())
        except (redis.RedisError, OSError) as error:
            raise KeyStoreError(f"the keys in Redis cannot be read: {error}") from error
        except ValidationError as error:
            raise KeyStoreError(f"a key in Redis is damaged: {_first(error)}") from error

    def add(self, record: KeyRecord) -> None:
        self._write(lambda pipeline: pipeline.hset(self._keys, record.key_id, cast(str, _RECORD.dump_json(record))))

    def remove(self, key_id: str) -> bool:
        return self._write(lambda pipeline: pipeline.hdel(self._keys, key_id)) > 0

    def _write(self, write: Callable[[redis.client.Pipeline], object]) -> int:
        try:
            with self._client.pipeline(transaction=True) as pipeline:
                write(pipeline)
                pipeline.incr(self._version)
                return int(pipeline.execute()[0])
        except (redis.RedisError, OSError) as error:
            raise KeyStoreError(f"the keys in Redis cannot be written: {error}") from error


def key_stores(admission: AdmissionSection, redis_url: Callable[[], str], key_prefix: str) -> list[KeyStore]:
    """Those that the configuration names; ``redis_url`` is asked only if one of them is Redis."""
    stores: list[KeyStore] = []
    if admission.keys_file:
        stores.append(FileKeyStore(Path(admission.keys_file).expanduser()))
    if admission.keys_in_redis:
        stores.append(RedisKeyStore(redis_url(), key_prefix))
    return stores


def admission_tag(key_prefix: str) -> str:
    """What the application's own keys of admission begin with."""
    return f"{{{key_prefix}:admission}}"


def _sorted(records: Iterable[KeyRecord]) -> list[KeyRecord]:
    return sorted(records, key=lambda record: (record.created_at_s, record.key_id))


def _first(error: ValidationError) -> str:
    mistake = error.errors()[0]
    return f"{'.'.join(map(str, mistake['loc'])) or 'it'}: {mistake['msg']}"


def _replace(path: Path, content: bytes) -> None:
    """Write a whole new file in its place; who reads meanwhile sees the old one or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
