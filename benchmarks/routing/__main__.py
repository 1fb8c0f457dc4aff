"""What routing costs a request, and how evenly several ingress processes spread what they cannot see of each other.

Real Redis, real routers, each with its own connection, four replicas that only hold requests and publish loads.

1. The time of one pick, with Redis well, slow (200 ms), down, flushed and restarted.
2. Herding: four routers share Poisson arrivals and bursts. Compared: no exchange of picks, the shipped counted picks,
   and an atomic pick-and-reserve script that every request waits for.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from benchmarks.results import RESULTS, markdown_table, result_file, update_result
from benchmarks.routing.herding import measure_herding
from benchmarks.routing.picks import measure_picks
from cluster.local.redis_server import RedisServer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=result_file, default=RESULTS / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as redis:
        picks = asyncio.run(measure_picks(redis))
        redis.stop()  # the one that was restarted ends with the thread that did it
        redis.start()
        herding = {
            mode: asyncio.run(measure_herding(mode, redis.url, arguments.seed))
            for mode in ("own", "counted", "reserve")
        }
    update_result(
        arguments.out,
        {
            "route_ms_p50": picks["well"]["p50"],
            "routing": {"seed": arguments.seed, "pick_ms": picks, "herding": herding},
        },
    )
    rows = [(state, *(f"{value:.3f}" for value in times.values())) for state, times in picks.items()]
    print(markdown_table(("Redis", "pick p50 (ms)", "p99", "max"), rows), "\n")
    rows = [(mode, *(f"{value:.2f}" for value in figures.values())) for mode, figures in herding.items()]
    print(markdown_table(("picks", "imbalance, mean", "p99", "in bursts", "pick p50 (ms)", "p99"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
