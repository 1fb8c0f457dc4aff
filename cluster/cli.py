"""The command line: start a local cluster, look at it, and steer brownout.

Exit codes: 0 done, 1 it could not be done, 2 the command or the configuration is wrong; each with one sentence.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from cluster.config import PROJECT_ROOT
from cluster.errors import ClusterError
from controller.laws.base import LawError
from engine.config import ConfigError
from engine.weights.manifest import CheckpointError

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient

DEFAULT_FILE = PROJECT_ROOT / "deploy/serve/demo.yaml"
WATCH_PERIOD_S = 1.0

console = Console(highlight=False)


def _version() -> str:
    try:
        return version("brownoutserve")
    except PackageNotFoundError:
        return "not installed"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(_version(), prog_name="brownoutserve")
def main() -> None:
    """Serve Mixture-of-Experts models on a Ray cluster that keeps its latency promises by dimming expert work.

    \b
    Try it:
      brownoutserve serve                      a cluster on this machine, on 127.0.0.1:8000
      curl http://127.0.0.1:8000/v1/models     in another shell: an OpenAI-compatible API
      brownoutserve status                     what the controller sees and what it decided
      brownoutserve brownout set 2             pin the brownout level
      brownoutserve brownout auto              give it back to the control law

    On a cluster that runs already, deploy with Ray's own command: serve deploy deploy/serve/FILE.yaml
    """


@main.command()
@click.argument("config", type=click.Path(path_type=Path), default=DEFAULT_FILE, required=False)
@click.option("--port", type=click.IntRange(1, 65535), help="HTTP port; default: the file's.")
def serve(config: Path, port: int | None) -> None:
    """Start a cluster on this machine and keep it until Ctrl-C.

    CONFIG is a Serve YAML file (default: deploy/serve/demo.yaml, a small random model on the CPU). Starts Ray, a
    private Redis (unless REDIS_URL is set), the controller, the ingress and the replicas, all on 127.0.0.1, and ends
    all of them with itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    with _one_sentence():
        from cluster.local import LocalCluster  # Ray takes a second to import

        with console.status("starting Ray, Redis, the controller, the ingress and the replicas"):
            cluster = LocalCluster.start(config, port)
        with cluster:
            welcome = _welcome(cluster.url, cluster.dashboard_url, cluster.file.config.model.served_name)
            console.print(welcome, soft_wrap=True)  # the command in it is there to be copied
            try:
                while True:
                    time.sleep(WATCH_PERIOD_S)
                    cluster.check()
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
                console.print("stopping")


def _welcome(url: str, dashboard_url: str, model: str) -> str:
    return (
        f"[bold]{model}[/bold] is served at [bold]{url}[/bold] (dashboard {dashboard_url}); Ctrl-C ends it\n"
        f"""  curl {url}/v1/completions -H 'content-type: application/json' \\\n"""
        f"""    -d '{{"model": "{model}", "prompt": "Hello", "max_tokens": 16}}'"""
    )


@main.command()
@click.option("--address", help="Ray address; default: RAY_ADDRESS, else the cluster on this machine.")
@click.option("--app", default="brownoutserve", show_default=True, help="Name of the Serve application.")
def status(address: str | None, app: str) -> None:
    """Show the policy, the setting in force, what was observed, and each replica."""
    with _controller(address, app) as controller:
        report = controller.status()
    policy = report["policy"]
    level = "" if policy["level"] is None else f", level {policy['level']}"
    console.print(f"policy {policy['law']}{level}; epoch {report['epoch']}; controller at {report['address']}")
    if not report["redis_ok"]:
        console.print("Redis does not answer: decisions are not being saved")
    for name, model in report["models"].items():
        console.print(f"\n[bold]{name}[/bold]: version {model['version']}, {model['law']}, {model['reason']}")
        console.print(_observation_line(model["observation"]))
        console.print(_replica_table(model["replicas"]))


def _observation_line(observation: dict[str, Any]) -> str:
    def ms(key: str) -> str:
        return "-" if observation[key] is None else f"{observation[key] * 1000:.0f} ms"

    return (
        f"TTFT p90 {ms('ttft_p90_s')}, TPOT p90 {ms('tpot_p90_s')}, running {observation['num_running']}, "
        f"waiting {observation['num_waiting']}, level {observation['level_now']:.1f} "
        f"of {observation['num_levels'] - 1}"
    )


def _replica_table(replicas: dict[str, dict[str, Any]]) -> Table:
    table = Table("replica", "level (prefill/decode)", "running", "waiting", "KV used", "version", "lease left")
    for name, replica in sorted(replicas.items()):
        used = replica["kv_used_frac"]
        table.add_row(
            name + (" (silent)" if replica["stale"] else ""),
            f"{replica['level_prefill']}/{replica['level_decode']}",
            str(replica["num_running"]),
            str(replica["num_waiting"]),
            "-" if used is None else f"{used:.0%}",
            str(replica["applied_version"]),
            f"{replica['lease_left_s']:.1f} s",
        )
    return table


@main.group()
@click.option("--address", help="Ray address; default: RAY_ADDRESS, else the cluster on this machine.")
@click.option("--app", default="brownoutserve", show_default=True, help="Name of the Serve application.")
@click.pass_context
def brownout(context: click.Context, address: str | None, app: str) -> None:
    """Steer dimming while serving; takes effect on the next engine step and outlives controller restarts."""
    context.obj = {"address": address, "app": app}


@brownout.command("off")
@click.pass_obj
def brownout_off(target: dict[str, str]) -> None:
    """Never dim: every answer is exact."""
    _set_policy(target, "off")


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
    """Follow another control law: predictive, aimd or static."""
    _set_policy(target, name)


def _set_policy(target: dict[str, str], law: str, level: int | None = None) -> None:
    with _controller(**target) as controller:
        controller.set_policy(law, level)
        policy = controller.status()["policy"]
    shown = "" if policy["level"] is None else f", level {policy['level']}"
    console.print(f"policy {policy['law']}{shown}")


@main.group()
def config() -> None:
    """Look at configuration files."""


@config.command("check")
@click.argument("file", type=click.Path(path_type=Path))
def config_check(file: Path) -> None:
    """Check a Serve YAML file: Ray's part and ours. Exit code 2 and one sentence if something is wrong."""
    with _one_sentence():
        from cluster.serve_file import load_serve_file  # Ray takes a second to import

        checked = load_serve_file(file)
    config = checked.config
    console.print(f"{file}: {config.model.served_name} on {config.replicas} replicas, law {config.controller.law}")


@contextmanager
def _controller(address: str | None, app: str) -> Iterator[ControllerClient]:
    """The controller of a running cluster."""
    from cluster.controller_client import ControllerClient  # Ray takes a second to import
    from cluster.driver import connect, find_cluster

    with _one_sentence():
        connect(find_cluster(address))
        yield ControllerClient(app)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Mistakes and failures that have a sentence of their own end with it, not with a traceback."""
    try:
        yield
    except (ConfigError, LawError) as error:
        _fail(str(error), 2)
    except (ClusterError, CheckpointError) as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; everything is stopped", 130)


def _fail(sentence: str, code: int) -> NoReturn:
    click.echo(f"brownoutserve: {sentence}", err=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
