"""``brownoutserve explain``: who decided what, from which inputs, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import click
from rich.table import Table

from cluster.commands.common import console, fail, running_controller, target_options
from cluster.explain import TimeRange, evidence, level_sentence, outcome, parse_range, request_sentences, summarise

MAX_REQUESTS = 1000  # of a time range, per replica


@click.command()
@click.argument("what")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as JSON.")
@click.option("--limit", default=40, show_default=True, help="Decisions to show, the newest.")
@target_options
def explain(what: str, as_json: bool, limit: int, address: str | None, app: str) -> None:
    """Tell what became of a request, or what was decided in a time range, by whom, on what evidence and why.

    \b
    WHAT is the id of a request (x-request-id of its answer) or a time range:
      brownoutserve explain 4f1c0e...              one request, and the decisions in force while it ran
      brownoutserve explain 10m                    the last ten minutes
      brownoutserve explain 12:00..12:05           today, by this machine's clock
      brownoutserve explain 2h..1h                 from two hours ago until one hour ago

    Replicas remember their last 4096 requests and level changes, the controller its last 4096 decisions, restarts
    included.
    """
    time_range = parse_range(what, datetime.now())
    with running_controller(address, app) as controller:
        if time_range is None:
            report = _of_request(controller, what)
        else:
            report = _of_range(controller, time_range)
    if not report["requests"] and time_range is None:
        fail(f"no replica remembers a request {what!r}, and it is no time range (try 10m or 12:00..12:05)", 1)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif time_range is None:
        _print_requests(report, limit)
    else:
        _print_range(report, time_range, limit)


def _of_request(controller: Any, request_id: str) -> dict[str, Any]:
    requests = controller.requests_of(request_id)
    decisions: list[dict[str, Any]] = []
    for request in requests:
        first, last = request["first_setting_version"], request["last_setting_version"]
        known = {(row["model_id"], row.get("version")) for row in decisions}
        decisions += [
            row
            for row in controller.decisions_of(request["model_id"], first, last)
            if (row["model_id"], row["version"]) not in known
        ]
    return {"requests": requests, "decisions": decisions}


def _of_range(controller: Any, time_range: TimeRange) -> dict[str, Any]:
    since_s, until_s = time_range.since_s, time_range.until_s
    requests = controller.requests_between(since_s, until_s, MAX_REQUESTS)
    return {
        "since_s": since_s,
        "until_s": until_s,
        "summary": summarise(requests),
        "decisions": controller.decisions_between(since_s, until_s),
        "level_changes": controller.level_changes(since_s, until_s),
        "requests": requests,
    }


def _print_requests(report: dict[str, Any], limit: int) -> None:
    for request in report["requests"]:
        first, last = request["first_setting_version"], request["last_setting_version"]
        in_force = [row for row in report["decisions"] if first <= row["version"] <= last]
        console.print(f"[bold]{request['request_id']}[/bold]", soft_wrap=True)
        for sentence in request_sentences(request, in_force):
            console.print(f"  {sentence}", soft_wrap=True)
    console.print()
    _print_decisions(report["decisions"], limit, "decisions in force meanwhile")


def _print_range(report: dict[str, Any], time_range: TimeRange, limit: int) -> None:
    summary = report["summary"]
    ttft = "-" if summary["ttft_p90_s"] is None else f"{summary['ttft_p90_s']:.3f} s"
    since, until = (
        datetime.fromtimestamp(at_s).strftime("%H:%M:%S") for at_s in (time_range.since_s, time_range.until_s)
    )
    console.print(
        f"[bold]{since} to {until}[/bold]: {summary['num_requests']} requests ended, {summary['num_dimmed']} of them "
        f"dimmed ({summary['dimmed_share']:.1%} of all expert pairs, level {summary['level_peak']} at most), "
        f"TTFT p90 {ttft}",
        soft_wrap=True,
    )
    for change in report["level_changes"][-limit:]:
        console.print(f"  {level_sentence(change)}", soft_wrap=True)
    _print_decisions(report["decisions"], limit, "decisions")


def _print_decisions(rows: Sequence[dict[str, Any]], limit: int, title: str) -> None:
    if not rows:
        console.print(f"no {title}: what was in force had been decided before")
        return
    table = Table("time", "version", "by", "why", "what (level range, margin)", "on what evidence", title=title)
    for row in rows[:limit]:
        table.add_row(
            datetime.fromtimestamp(row["time_s"]).strftime("%H:%M:%S.%f")[:-5],
            str(row.get("version", "")),
            row["by"],
            row["reason"],
            outcome(row),
            evidence(row),
        )
    console.print(table)
    if len(rows) > limit:
        console.print(f"and {len(rows) - limit} older ones: --limit shows more")
