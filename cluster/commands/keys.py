"""``brownoutserve keys``: make, list and revoke API keys."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cluster.commands.common import console, fail, one_sentence

if TYPE_CHECKING:
    from cluster.admission.key_store import KeyStore

UNITS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}


class Lifetime(click.ParamType):
    """Seconds, from 12h, 30d or 4w."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return value
        if not (match := re.fullmatch(r"(\d+)([hdw])", value)):
            self.fail(f"{value!r} is no duration such as 12h, 30d or 4w", param, context)
        return int(match[1]) * UNITS_S[match[2]]


config_argument = click.argument("config", type=click.Path(path_type=Path))


@click.group()
def keys() -> None:
    """Make, list and revoke API keys.

    CONFIG is the Serve YAML file of the application. Its section "admission" says where keys are kept and what each
    tenant may do; a key only says whose it is:

    \b
      admission:
        keys_file: /etc/brownoutserve/keys.json   # on every node with an ingress; or in Redis: keys_in_redis: true
        tenants:
          acme: {requests_per_minute: 600, tokens_per_minute: 200000, max_concurrent: 16, weight: 2}
        default: {requests_per_minute: 60, max_concurrent: 4}

    Only hashes are kept. What is changed here holds in every ingress a second later, without a restart.
    """


@keys.command("create")
@config_argument
@click.option("--tenant", required=True, help="Whose key it is.")
@click.option("--expires", type=Lifetime(), help="For how long it is valid, such as 30d; default: for ever.")
@click.option("--label", default="", help="A note for people: who has it, where it is used.")
def keys_create(config: Path, tenant: str, expires: float | None, label: str) -> None:
    """Make a key and print it, this once."""
    with one_sentence():
        from cluster.admission.keys import new_key
        from cluster.admission.tenants import check_tenant_name

        check_tenant_name(tenant)
        key, record = new_key(tenant, time.time(), expires, label)
        _store(config).add(record)
    click.echo(key)
    click.echo(f"key {record.key_id} of tenant {tenant}; it is shown this once only", err=True)


@keys.command("list")
@config_argument
def keys_list(config: Path) -> None:
    """Show all keys, without what would let anyone in."""
    with one_sentence():
        records = _store(config).load() or []
    table = Table("key", "tenant", "made", "expires", "label")
    for record in records:
        table.add_row(record.key_id, record.tenant, _day(record.created_at_s), _day(record.expires_at_s), record.label)
    console.print(table)


@keys.command("revoke")
@config_argument
@click.argument("key_id")
def keys_revoke(config: Path, key_id: str) -> None:
    """Make a key worthless; KEY_ID is what "keys list" shows, or the key itself."""
    key_id = key_id.split("_")[1] if key_id.count("_") >= 2 else key_id
    with one_sentence():
        was_there = _store(config).remove(key_id)
    if not was_there:
        fail(f"there is no key {key_id!r}", 1)
    click.echo(f"key {key_id} is revoked")


def _store(path: Path) -> KeyStore:
    """Where the application's keys are kept. Raises ConfigError."""
    from cluster.admission.config import AdmissionSection
    from cluster.admission.key_store import key_stores
    from cluster.config import ClusterConfigError
    from cluster.names import key_prefix
    from cluster.serve_file import load_serve_file  # Ray takes a second to import

    file = load_serve_file(path)
    admission = file.config.admission or AdmissionSection()
    stores = key_stores(admission, file.config.resolved_redis_url, key_prefix(file.app_name))
    if not stores:
        raise ClusterConfigError(f"{path} asks for no keys; set admission.keys_file or admission.keys_in_redis")
    return stores[0]


def _day(unix_s: float | None) -> str:
    return "never" if unix_s is None else datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")
