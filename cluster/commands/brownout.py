"""``brownoutserve brownout``: the operator's hand on the dimmer."""

from __future__ import annotations

import click

from cluster.commands.common import console, running_controller, target_options


@click.group()
@target_options
@click.pass_context
def brownout(context: click.Context, address: str | None, app: str) -> None:
    """Steer dimming while serving; takes effect on the next engine step and outlives controller restarts."""
    context.obj = {"address": address, "app": app}


@brownout.command("off")
@click.pass_obj
def brownout_off(target: dict[str, str]) -> None:
    """Never dim: every answer is exact."""
    _set_policy(target, "off")


@brownout.command("freeze")
@click.pass_obj
def brownout_freeze(target: dict[str, str]) -> None:
    """Pin the level that the replicas have now, whatever the load does next."""
    _set_policy(target, "freeze")


@brownout.command("auto")
@click.pass_obj
def brownout_auto(target: dict[str, str]) -> None:
    """Follow the control law that the application was deployed with."""
    _set_policy(target, "auto")


@brownout.command("set")
@click.argument("level", type=click.IntRange(min=0))
@click.pass_obj
def brownout_set(target: dict[str, str], level: int) -> None:
    """Pin the brownout level: 0 is exact, higher is faster and less exact."""
    _set_policy(target, "static", level)


@brownout.command("law")
@click.argument("name")
@click.pass_obj
def brownout_law(target: dict[str, str], name: str) -> None:
    """Follow another control law: predictive, pi, aimd or static."""
    _set_policy(target, name)


def _set_policy(target: dict[str, str], law: str, level: int | None = None) -> None:
    with running_controller(**target) as controller:
        controller.set_policy(law, level)
        policy = next(iter(controller.status()["models"].values()), controller.status())["policy"]
    shown = "" if policy["level"] is None else f", level {policy['level']}"
    console.print(f"policy {policy['law']}{shown}")
