"""Serve's side of the planned number of replicas: an autoscaling policy that asks for what the controller planned.

Serve pickles the class by value and runs it in its own controller, where nothing may block: a thread reads the plan
from Redis, and a plan that has expired (no controller, no Redis) leaves the number of replicas as it is. Serve keeps
the configured limits; how long a lower need must last before a replica goes is the planner's own business.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from typing import Any

import redis

APP = "<app>"  # stands for the application's name, which its own builder does not know
POLL_S = 0.5
TIMEOUT_S = 1.0
STALE_S = 5.0  # without an answer from Redis for so long, the last plan does not count any more

logger = logging.getLogger(__name__)


class PlannedReplicas:
    """Answers Serve's question how many replicas a deployment should have."""

    def __init__(self, key: str, redis_url: str = "") -> None:
        """``key`` of the plan, with APP in it; ``redis_url`` empty: REDIS_URL of the environment."""
        self._key = key
        self._url = redis_url or os.environ.get("REDIS_URL", "")
        self._desired: int | None = None
        self._read_at_s = float("-inf")
        self._thread: threading.Thread | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``context``: Serve's AutoscalingContext."""
        if self._thread is None:
            self._begin(context.app_name)
        is_fresh = time.monotonic() - self._read_at_s <= STALE_S
        return (self._desired if is_fresh and self._desired is not None else context.target_num_replicas), {}

    def _begin(self, app_name: str) -> None:
        if not self._url:
            logger.error("no REDIS_URL where Serve's controller runs: the number of replicas stays as it is")
        key = self._key.replace(APP, app_name)
        self._thread = threading.Thread(target=_poll, args=(weakref.ref(self), self._url, key), daemon=True)
        if self._url:
            self._thread.start()

    def take(self, plan: bytes | None) -> None:
        """What Redis has under the plan's key now."""
        self._desired = None if plan is None else int(json.loads(plan)["desired"])
        self._read_at_s = time.monotonic()


def _poll(policy_ref: weakref.ref[PlannedReplicas], url: str, key: str) -> None:
    """Read the plan for as long as its policy is in use."""
    client = redis.Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
    while (policy := policy_ref()) is not None:
        try:
            policy.take(client.get(key))  # type: ignore[arg-type]  # redis-py's types cover its async client too
        except (redis.RedisError, OSError, ValueError, KeyError, TypeError) as error:
            logger.debug("no plan: %s", error)
        del policy
        time.sleep(POLL_S)
    client.close()
