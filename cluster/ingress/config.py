"""The ``ingress`` section of a Serve application's ``args``: how much the HTTP front takes, and how long it waits."""

from __future__ import annotations

from pydantic import Field

from cluster.section import Section


class IngressSection(Section):
    """The HTTP front. One ingress replica serves ``max_concurrent`` requests; more get 503 with Retry-After.

    ``idle_timeout_s`` ends a request that got nothing from its engine for so long; it includes the wait in the queue.
    ``max_stream_s`` ends it however much it gets. Slow and silent clients: a body must have come within
    ``body_timeout_s``, and a client that takes nothing of its stream for ``send_timeout_s`` loses it. What the proxy in
    front allows, headers and connections, is set in its environment: see deploy/ray/haproxy.sh.
    ``admin_token`` is what PUT /v1/brownout asks for; empty: brownout is pinned with the CLI only. Where API keys are
    asked for, /metrics and GET /v1/brownout take it too. ``allowed_origins``: of which pages a browser may read the
    API's answers; "*": of any.
    """

    num_replicas: int = Field(default=1, ge=1)
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1024)
    max_header_bytes: int = Field(default=16 * 1024, ge=1024)
    max_concurrent: int = Field(default=4096, ge=1)
    body_timeout_s: float = Field(default=10.0, gt=0)
    idle_timeout_s: float = Field(default=300.0, gt=0)
    send_timeout_s: float = Field(default=30.0, gt=0)
    max_stream_s: float = Field(default=3600.0, gt=0)
    admin_token: str = ""
    allowed_origins: list[str] = Field(default_factory=list)
