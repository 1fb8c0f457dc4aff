"""Who is asking: API keys for what tenants use, the admin token for what operators use."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Mapping
from enum import Enum

from cluster.admission.config import AdmissionSection
from cluster.admission.key_watch import KeyWatch
from cluster.admission.keys import KeyFault
from cluster.admission.tenants import ANONYMOUS, Tenant
from cluster.ingress.errors import DEFAULT_RETRY_AFTER_S, ApiError, Outcome

SCHEME = "bearer"

logger = logging.getLogger(__name__)


class Access(Enum):
    """Whom a route is for."""

    TENANT = "tenant"
    OPERATOR = "operator"  # reads what concerns everybody
    ADMIN = "admin"  # changes it


class Authenticator:
    """Names the tenant of a request. Without ``keys`` everybody is the anonymous one."""

    def __init__(self, admission: AdmissionSection, keys: KeyWatch | None, admin_token: str) -> None:
        self._admission = admission
        self._keys = keys
        self._admin_token = admin_token
        self._anonymous = Tenant(ANONYMOUS, admission.limits_of(ANONYMOUS))
        if keys is None:
            logger.warning("the API is open: no API keys are asked for (admission.keys_file, admission.keys_in_redis)")
        elif not len(keys.ring):
            logger.warning("no API keys are known yet; make one with `brownoutserve keys create`")

    def tenant(self, headers: Mapping[str, str]) -> Tenant:
        """Whose key the Authorization header holds. Raises ApiError: unauthorized, or unavailable."""
        if self._keys is None:
            return self._anonymous
        self._keys.watch()
        if not self._keys.is_ready:
            raise ApiError(Outcome.UNAVAILABLE, "the API keys cannot be read yet", retry_after_s=DEFAULT_RETRY_AFTER_S)
        key = bearer(headers)
        if key is None:
            raise ApiError(Outcome.UNAUTHORIZED, "no API key was given; send it as Authorization: Bearer KEY")
        record = self._keys.ring.find(key, time.time())
        if isinstance(record, KeyFault):
            raise ApiError(Outcome.UNAUTHORIZED, f"the API key is {record.value}")
        return Tenant(record.tenant, self._admission.limits_of(record.tenant), record.key_id)

    def check(self, access: Access, headers: Mapping[str, str]) -> None:
        """What changes everybody's answers takes the admin token; what tells of everybody does where keys are asked
        for. Raises ApiError (forbidden)."""
        if access is Access.OPERATOR and self._keys is None:
            return
        if not self._admin_token:
            raise ApiError(Outcome.FORBIDDEN, "this route takes the admin token, and ingress.admin_token is not set")
        if not hmac.compare_digest((bearer(headers) or "").encode(), self._admin_token.encode()):
            raise ApiError(Outcome.FORBIDDEN, "the Authorization header does not hold the admin token")


def bearer(headers: Mapping[str, str]) -> str | None:
    """The token of the Authorization header, None if it holds none."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == SCHEME else None
