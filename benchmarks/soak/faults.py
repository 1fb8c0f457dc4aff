"""What goes wrong on the servers' side of the soak: replicas are killed, Redis restarts."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import suppress

from cluster.local.cluster import LocalCluster, ServeUnavailableError

NUM_REPLICAS = 2
WHOLE_TIMEOUT_S = 120.0  # for a lost replica to be replaced, before the next one is killed
REDIS_RESTARTS = (1 / 3, 2 / 3)  # of the run
REDIS_AWAY_S = 2.0


def running_pids(cluster: LocalCluster, deployment: str) -> list[int]:
    """Of the replicas that serve; none while Serve cannot be asked."""
    try:
        app = cluster.serve_details()["applications"].get(cluster.file.app_name, {"deployments": {}})
    except ServeUnavailableError:
        return []
    replicas = app["deployments"].get(deployment, {"replicas": []})["replicas"]
    return [replica["pid"] for replica in replicas if replica["state"] == "RUNNING" and replica["pid"]]


class Faults:
    """Kills replicas and restarts Redis on time; told apart from the load, which goes on."""

    def __init__(self, cluster: LocalCluster, duration_s: float, num_kills: int, draw: random.Random) -> None:
        self._cluster = cluster
        self._num_kills_planned = num_kills
        self._duration_s = duration_s
        self._draw = draw
        self.num_kills = 0
        self.num_redis_restarts = 0

    async def run(self) -> None:
        planned = self._num_kills_planned
        kills = [(self._duration_s * (n + 0.5) / planned, self._kill) for n in range(planned)]
        restarts = [(self._duration_s * share, self._restart_redis) for share in REDIS_RESTARTS]
        started_s = time.monotonic()
        for at_s, fault in sorted([*kills, *restarts], key=lambda pair: pair[0]):
            await asyncio.sleep(max(0.0, started_s + at_s - time.monotonic()))
            await asyncio.to_thread(fault)

    def _kill(self) -> None:
        """Never the last one: a cluster without replicas serves nobody."""
        deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
        while len(pids := running_pids(self._cluster, "EngineReplica")) < NUM_REPLICAS:
            if time.monotonic() > deadline_s:
                return
            time.sleep(0.2)
        with suppress(ProcessLookupError):  # it has just gone by itself
            os.kill(self._draw.choice(sorted(pids)), signal.SIGKILL)
            self.num_kills += 1

    def _restart_redis(self) -> None:
        pid = self._cluster.redis.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        time.sleep(REDIS_AWAY_S)
        self._cluster.redis.start()
        self.num_redis_restarts += 1
