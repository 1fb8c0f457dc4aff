"""``brownoutserve status``: what the controller sees and what it decided."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from cluster.commands.common import console, running_controller, target_options


@click.command()
@target_options
def status(address: str | None, app: str) -> None:
    """Show the policy, the setting in force, what was observed, and each replica."""
    with running_controller(address, app) as controller:
        report = controller.status()
    policy = report["policy"]
    level = "" if policy["level"] is None else f", level {policy['level']}"
    console.print(f"policy {policy['law']}{level}; epoch {report['epoch']}; controller at {report['address']}")
    if report["superseded"]:
        console.print("[bold red]it has stood down: a newer controller uses the same Redis keys[/bold red]")
    if not report["redis_ok"]:
        console.print("Redis does not answer: decisions are not being saved")
    for name, model in report["models"].items():
        console.print(f"\n[bold]{name}[/bold]: version {model['version']}, {model['law']}, {model['reason']}")
        console.print(_observation_line(model["observation"]))
        for line in (*_quality_lines(model["quality"]), *_plan_lines(model["plan"], model["measures"])):
            console.print(line)
        console.print(_replica_table(model["replicas"]))


def _observation_line(observation: dict[str, Any]) -> str:
    def ms(key: str) -> str:
        return "-" if observation[key] is None else f"{observation[key] * 1000:.0f} ms"

    return (
        f"TTFT p90 {ms('ttft_p90_s')}, TPOT p90 {ms('tpot_p90_s')}, running {observation['num_running']}, "
        f"waiting {observation['num_waiting']}, level {observation['level_now']:.1f} "
        f"of {observation['num_levels'] - 1}"
    )


def _quality_lines(quality: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"quality of class {name}: {budget['left_frac']:.0%} of the hour's budget left, "
        f"may lose {budget['allowed_loss_nats']:.3g} nats now"
        for name, budget in quality.items()
    ]


def _plan_lines(plan: dict[str, Any] | None, measures: dict[str, Any] | None) -> list[str]:
    lines = [] if plan is None else [f"plan: {plan['desired']} replicas, {plan['reason']}"]
    if measures and measures["rungs"]:
        lines.append(f"measures: {', '.join(measures['rungs'])} ({measures['reason']})")
    return lines


def _replica_table(replicas: dict[str, dict[str, Any]]) -> Table:
    table = Table("replica", "level (prefill/decode)", "running", "waiting", "KV used", "version", "lease left")
    for name, replica in sorted(replicas.items()):
        used = replica["kv_used_frac"]
        table.add_row(
            name + (" (not believed)" if replica["quarantined"] else " (silent)" if replica["stale"] else ""),
            f"{replica['level_prefill']}/{replica['level_decode']}",
            str(replica["num_running"]),
            str(replica["num_waiting"]),
            "-" if used is None else f"{used:.0%}",
            str(replica["applied_version"]),
            f"{replica['lease_left_s']:.1f} s",
        )
    return table
