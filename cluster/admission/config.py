"""The ``admission`` section of a Serve application's ``args``: who may come in, how fast, and how they wait."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from cluster.admission.tenants import TenantLimits, check_tenant_name
from cluster.section import Section
from engine.config import require


class AdmissionSection(Section):
    """Without this section the API is open to all, and requests go straight to the engines.

    ``keys_file``, ``keys_in_redis``: where API keys are kept (see ``brownoutserve keys --help``); with neither,
    everybody is the tenant "anonymous". ``tenants``: name |-> limits; ``default`` holds for all others.

    ``in_flight_frac``: how many requests the engines hold, in full batches; the rest waits here, each tenant in a queue
    of its own. Sizing: above 1, so that the governors see a queue and a freed place is taken at once.
    ``max_wait_s``: longest wait for a place. ``shed``: refuse part of a queue early once nothing milder helps.
    """

    keys_file: str = ""
    keys_in_redis: bool = False
    default: TenantLimits = TenantLimits()
    tenants: dict[str, TenantLimits] = Field(default_factory=dict)
    in_flight_frac: float = Field(default=1.25, gt=0, le=100)
    max_wait_s: float = Field(default=30.0, gt=0)
    shed: bool = True

    @model_validator(mode="after")
    def _names_can_be(self) -> AdmissionSection:
        for name in self.tenants:
            check_tenant_name(name)
        return self

    @property
    def wants_keys(self) -> bool:
        return bool(self.keys_file) or self.keys_in_redis

    def limits_of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.default)


def check_models(admission: AdmissionSection | None, served: Sequence[str]) -> None:
    """Raises ConfigError when a tenant's models are not served here."""
    if admission is None:
        return
    for name, limits in (("default", admission.default), *admission.tenants.items()):
        for model in limits.models:
            require(model in served, f"admission: models of tenant {name}", model, ", ".join(served))
