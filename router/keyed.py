"""Keyed: the ring of the HTTP face that knows who asks.

1. A request's key names its tenant, who is noted in the scope's state; no key, or a wrong one, is a 401.
2. Answers to a tenant with limits say what remains of them (x-ratelimit-*).

Where nobody has keys everyone is the nameless tenant. Keys come from headers only: query strings end up in logs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import SteelyardError
from router.quota import Quota
from router.tenants import OPEN, KeyRing, Tenant

SCHEME = "bearer "


class InvalidApiKey(SteelyardError):
    code = "invalid_api_key"
    status = 401


class TenantDisabled(SteelyardError):
    code = "tenant_disabled"
    status = 403


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they have used of their limits at this gateway."""

    tenant: Tenant
    quota: Quota

    @property
    def namespace(self) -> str:
        """Of the prefix cache: no tenant finds, by its times or its counts, what another has asked."""
        return f"tenant:{self.tenant.name}" if self.tenant.name else ""


class Callers:
    """The quotas of all tenants. One's starts anew when its limits, or the number of gateways, change."""

    def __init__(self, keys: Callable[[], KeyRing | None], num_gateways: Callable[[], int]) -> None:
        self._keys = keys
        self._num_gateways = num_gateways
        self._quotas: dict[str, tuple[Tenant, int, Quota]] = {}

    def caller(self, headers: Headers, now_s: float) -> Caller:
        """InvalidApiKey, TenantDisabled."""
        ring = self._keys()
        if ring is None:
            return self.nobody(now_s)
        tenant = ring.find(key_in(headers))
        if tenant is None:
            raise InvalidApiKey("Incorrect API key provided")
        if not tenant.enabled:
            raise TenantDisabled("This tenant is disabled")
        return self._of(tenant, now_s)

    def nobody(self, now_s: float) -> Caller:
        return self._of(OPEN, now_s)

    def _of(self, tenant: Tenant, now_s: float) -> Caller:
        num_gateways = self._num_gateways()
        known = self._quotas.get(tenant.name)
        if known is None or known[0].limits != tenant.limits or known[1] != num_gateways:
            known = (tenant, num_gateways, Quota(tenant.limits, now_s, num_gateways))
            self._quotas[tenant.name] = known
        return Caller(tenant, known[2])


def key_in(headers: Headers) -> bytes:
    """The key that a request shows. InvalidApiKey if there is none, or more than one."""
    said = [one.strip() for one in headers.getlist("x-api-key")]
    for one in headers.getlist("authorization"):
        if one[: len(SCHEME)].lower() != SCHEME:
            raise InvalidApiKey("The Authorization header must be: Bearer <API key>")
        said.append(one[len(SCHEME) :].strip())
    keys = set(said)
    if len(keys) > 1:
        raise InvalidApiKey("The request shows several API keys")
    key = said[0] if said else ""
    if not key:
        raise InvalidApiKey("No API key was given; send it as 'Authorization: Bearer <API key>'")
    return key.encode("latin-1", "replace")


def caller_of(request: HttpRequest) -> Caller:
    return request.state.caller


class Keyed:
    """ASGI middleware, inside of Boundary: what it raises becomes an answer there."""

    def __init__(self, app: ASGIApp, callers: Callers, open_paths: frozenset[str]) -> None:
        self._app = app
        self._callers = callers
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        is_open = scope["path"] in self._open_paths
        caller = self._callers.nobody(clock()) if is_open else self._callers.caller(Headers(scope=scope), clock())
        scope.setdefault("state", {})["caller"] = caller

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in caller.quota.headers(clock()).items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive, send_counted)
