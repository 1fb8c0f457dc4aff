"""One API request's stay in the ingress: its place is taken once and given back once, it is counted and logged once."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.admission.tenants import UNLIMITED, Tenant
from cluster.ingress.admission import Admission, Permit
from cluster.ingress.errors import Outcome
from cluster.ingress.limits import ConcurrencyLimit
from cluster.ingress.metrics import RequestCounter
from cluster.ingress.openai.responses import Choice
from cluster.ingress.trace import take_request_id, take_trace
from cluster.logs import fields
from engine.types import GenerationRequest

NOBODY = Tenant("", UNLIMITED)  # not known yet, or an operator

logger = logging.getLogger(__name__)


class Visit:
    """``headers`` are the request's; ``endpoint`` is the label in metrics and log lines."""

    def __init__(
        self,
        limit: ConcurrencyLimit,
        counter: RequestCounter,
        endpoint: str,
        headers: Mapping[str, str],
        admission: Admission | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.tenant = NOBODY
        self.request_id = take_request_id(headers)
        self.trace = take_trace(headers)
        self.arrived_s = time.monotonic()
        self._limit = limit
        self._counter = counter
        self._admission = admission
        self._known = False  # to admission
        self._permit: Permit | None = None
        self._used = (0, 0)  # prompt tokens, answer tokens
        self._inside = False
        self._ended = False
        self._first_output_s: float | None = None
        self._details: dict[str, Any] = {}

    def enter(self) -> None:
        """Raises ApiError: busy when the ingress is full, 429 when the tenant's part of it is."""
        if self._admission is not None and self.tenant is not NOBODY:
            self._admission.enter(self.tenant)
            self._known = True
        self._limit.acquire()
        self._inside = True

    def begin(self, requests: Sequence[GenerationRequest], streams: bool) -> None:
        """The engines are asked; what the log line says of it."""
        self._details.update(
            {"class": requests[0].service_class.value, "choices": len(requests), "stream": bool(streams)}
        )

    def take(self, permit: Permit) -> None:
        """Hold a place in the engines until the end."""
        self._permit = permit
        self._details["queue_ms"] = round((time.monotonic() - self.arrived_s) * 1000, 3)

    @property
    def counted_from_s(self) -> float:
        """When the request came, for those who go by how long it waits: not counting what its tenant's own limit
        made it wait, or one tenant's flood would have the engines dim everybody."""
        return self.arrived_s + (self._permit.own_s if self._permit else 0.0)

    def note_output(self) -> None:
        """The engines have said something."""
        if self._first_output_s is None:
            self._first_output_s = time.monotonic()

    def note_answer(self, choices: Sequence[Choice], num_choices_per_prompt: int) -> None:
        """What the answer cost; never what it says."""
        begun = [choice for choice in choices[::num_choices_per_prompt] if choice.num_tokens]
        self._used = (sum(len(choice.prompt_ids) for choice in begun), sum(choice.num_tokens for choice in choices))
        usages = [choice.usage for choice in choices if choice.usage is not None]
        self._details.update(
            {
                "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
                "completion_tokens": sum(usage.completion_tokens for usage in usages),
                "level_peak": max((usage.brownout.level_peak for usage in usages), default=0),
                "finish_reason": str(choices[0].finish_reason),
            }
        )

    def leave(self, outcome: Outcome) -> None:
        """Only the first call counts."""
        if self._inside:
            self._inside = False
            self._limit.release()
        if self._admission is not None and self._known:
            self._known = False
            if self._permit is not None:
                self._admission.end(self._permit, *self._used)
            self._admission.leave(self.tenant)
        if self._ended:
            return
        self._ended = True
        self._counter.count(self.endpoint, outcome)
        logger.info("request", extra=fields(self._line(outcome)))

    def _line(self, outcome: Outcome) -> dict[str, Any]:
        def ms_since_arrival(moment_s: float | None) -> float | None:
            return None if moment_s is None else round((moment_s - self.arrived_s) * 1000, 3)

        return {
            "request_id": self.request_id,
            "trace_id": self.trace.trace_id,
            "span_id": self.trace.span_id,
            "endpoint": self.endpoint,
            "outcome": outcome.label,
            "status": outcome.status,
            "ttft_ms": ms_since_arrival(self._first_output_s),
            "duration_ms": ms_since_arrival(time.monotonic()),
            **({"tenant": self.tenant.name, "key_id": self.tenant.key_id} if self.tenant.key_id else {}),
            **self._details,
        }
