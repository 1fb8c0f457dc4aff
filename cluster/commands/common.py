"""What all commands share: the terminal, the controller of a running cluster, and mistakes told in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console

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
