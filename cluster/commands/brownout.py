"""``brownoutserve brownout``: the operator's hand on the dimmer."""

from __future__ import annotations

from dataclasses import dataclass

import click

from cluster.commands.common import console, fail, running_controller, target_options


@dataclass(frozen=True, slots=True)
class Target:
    """Whom an order concerns."""

    address: str | None
    app: str
    model: str | None


@click.group()
@target_options
@click.option("--model", help="One of several models, by its name in /v1/models; without it, all of them.")
@click.pass_context
def brownout(context: click.Context, address: str | None, app: str, model: str | None) -> None:
    """Steer dimming while serving; takes effect on the next engine step and outlives controller restarts."""
    context.obj = Target(address, app, model)


@brownout.command("off")
@click.pass_obj
def brownout_off(target: Target) -> None:
    """Never dim: every answer is exact."""
    _set_policy(target, "off")


@brownout.command("freeze")
@click.pass_obj
def brownout_freeze(target: Target) -> None:
    """Pin the level that the replicas have now, whatever the load does next."""
    _set_policy(target, "freeze")


@brownout.command("auto")
@click.pass_obj
def brownout_auto(target: Target) -> None:
    """Follow the control law that the application was deployed with."""
    _set_policy(target, "auto")


@brownout.command("set")
@click.argument("level", type=click.IntRange(min=0))
@click.pass_obj
def brownout_set(target: Target, level: int) -> None:
    """Pin the brownout level: 0 is exact, higher is faster and less exact."""
    _set_policy(target, "static", level)


@brownout.command("law")
@click.argument("name")
@click.pass_obj
def brownout_law(target: Target, name: str) -> None:
    """Follow another control law: predictive, pi or aimd."""
    if name == "static":
        fail("static is a level that is pinned; brownoutserve brownout set LEVEL does that", 2)
    _set_policy(target, name)


def _set_policy(target: Target, law: str, level: int | None = None) -> None:
    with running_controller(target.address, target.app) as controller:
        controller.set_policy(law, level, target.model)
        status = controller.status()
    models = {name: model for name, model in status["models"].items() if target.model in (None, name)}
    for name, described in models.items() or [("no model has reported", status)]:
        policy = described["policy"]
        shown = "" if policy["level"] is None else f", level {policy['level']}"
        console.print(f"{name}: policy {policy['law']}{shown}")
