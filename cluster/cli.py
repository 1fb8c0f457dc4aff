"""The command line: start a local cluster, look at it, and steer brownout. One module per command in cluster/commands.

Exit codes: 0 done, 1 it could not be done, 2 the command or the configuration is wrong; each with one sentence.
"""

from __future__ import annotations

import click

from cluster.commands.brownout import brownout
from cluster.commands.calibrate import calibrate
from cluster.commands.checkpoint import checkpoint
from cluster.commands.config import config
from cluster.commands.explain import explain
from cluster.commands.keys import keys
from cluster.commands.serve import serve
from cluster.commands.status import status
from cluster.commands.unite import unite
from cluster.commands.united import united
from cluster.version import VERSION


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(VERSION, prog_name="brownoutserve")
def main() -> None:
    """Serve Mixture-of-Experts models on a Ray cluster that keeps its latency promises by dimming expert work.

    \b
    Try it:
      brownoutserve serve                      a cluster on this machine, on 127.0.0.1:8000
      curl http://127.0.0.1:8000/v1/models     in another shell: an OpenAI-compatible API
      brownoutserve status                     what the controller sees and what it decided
      brownoutserve brownout set 2             pin the brownout level
      brownoutserve brownout auto              give it back to the control law
      brownoutserve explain 10m                who decided what in the last ten minutes, and why

    On a cluster that runs already, deploy with Ray's own command: serve deploy deploy/serve/FILE.yaml
    """


for command in (serve, status, brownout, explain, config, keys, unite, calibrate, united, checkpoint):
    main.add_command(command)

if __name__ == "__main__":
    main()
