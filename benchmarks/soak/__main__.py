"""A soak: a cluster at 80 % of its capacity, while clients leave or send nonsense, replicas die and Redis restarts.

At the end every request must be accounted for and nothing may be left over.

    python -m benchmarks.soak --duration-s 600

Two replicas of a tiny model. One request in ten is abandoned, one in twenty is bad. A replica is killed ten times over
the run, Redis restarted twice. The part "soak" of results/serving.json says how the requests ended, what hung and what
leaked. Exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.results import RESULTS, result_file, update_result
from benchmarks.soak.run import run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--duration-s", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=result_file, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    figures = run(arguments.duration_s, arguments.seed)
    update_result(arguments.out, {"soak": figures})
    print(json.dumps({key: value for key, value in figures.items() if key != "ingress"}, indent=2))
    failed = figures["hung"] or figures["leaked"] or figures["unexpected"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
