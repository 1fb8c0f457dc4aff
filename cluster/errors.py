"""What the cluster's own code fails with."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """A cluster cannot be started, found or used; says why in one sentence."""
