"""What all commands share: the terminal, the controller of a running cluster, and mistakes told in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from cluster.errors import ClusterError
from controller.laws.base import LawError
from engine.config import ConfigError
from engine.weights.manifest import CheckpointError

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient

console = Console(highlight=False)


def target_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options ``address`` and ``app``: which cluster, and which application on it."""
    address = click.option("--address", help="Ray address; default: RAY_ADDRESS, else the cluster on this machine.")
    app = click.option("--app", default="brownoutserve", show_default=True, help="Name of the Serve application.")
    return address(app(command))


def text_option(said: str) -> Callable[..., Any]:
    """Option ``texts``: files to calibrate on."""
    file = click.Path(path_type=Path, exists=True, dir_okay=False)
    said += " UTF-8, plain, .gz or .xz. May be given several times."
    return click.option("--text", "texts", type=file, multiple=True, required=True, help=said)


def work_bar(*more: ProgressColumn) -> Progress:
    """A progress bar for long work: what is done, how much of it, for how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *more, console=console)


@contextmanager
def running_controller(address: str | None, app: str) -> Iterator[ControllerClient]:
    """The controller of a running cluster."""
    from cluster.controller_client import ControllerClient  # Ray takes a second to import
    from cluster.driver import connect, find_cluster

    with one_sentence():
        connect(find_cluster(address))
        yield ControllerClient(app)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Mistakes and failures that have a sentence of their own end with it, not with a traceback."""
    try:
        yield
    except (ConfigError, LawError) as error:
        fail(str(error), 2)
    except (ClusterError, CheckpointError) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; everything is stopped", 130)


def fail(sentence: str, code: int) -> NoReturn:
    click.echo(f"brownoutserve: {sentence}", err=True)
    raise SystemExit(code)
