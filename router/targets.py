"""Targets: by when a request wants its first token, how fast the others, and its end. From its headers, else from its
class, else from the config.

    x-slo-ttft-ms: 500       first token within so many milliseconds of its arrival
    x-slo-tpot-ms: 50        at most so many per further token, on average
    x-deadline-ms: 30000     all of it within so many; never later than the config says
    x-slo-class: batch       a class of router.classes, for what no other header says; without it, its tenant's

Who names no target anywhere is promised none. A class also says who yields to whom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from engine.errors import InvalidRequest
from engine.types import Request
from router.config import RouterConfig, ServiceClass
from router.errors import shown
from router.tenants import OPEN, Tenant

TTFT, TPOT, DEADLINE, CLASS = "x-slo-ttft-ms", "x-slo-tpot-ms", "x-deadline-ms", "x-slo-class"
MAX_MS = 86_400_000.0  # a day


def with_targets(
    request: Request, headers: Mapping[str, str], config: RouterConfig, since_arrival_s: float, tenant: Tenant = OPEN
) -> Request:
    """The request with its targets, of which this much time has passed. Raises InvalidRequest that names the header."""
    kind = _class_of(headers, config, tenant)
    ttft_s = _first(_seconds(headers, TTFT), kind.ttft_s)
    tpot_s = _first(_seconds(headers, TPOT), kind.tpot_s)
    deadline_s = min(_seconds(headers, DEADLINE) or math.inf, request.timeout_s)
    service = replace(request.service, priority=kind.priority, ttft_s=max(0.0, ttft_s - since_arrival_s), tpot_s=tpot_s)
    return replace(request, service=service, timeout_s=max(0.0, deadline_s - since_arrival_s))


def _class_of(headers: Mapping[str, str], config: RouterConfig, tenant: Tenant) -> ServiceClass:
    """Without a name it is what the config says. One of which the class says nothing has no such target."""
    name = headers.get(CLASS, tenant.slo_class)
    if name is None:
        return ServiceClass(ttft_s=config.ttft_s, tpot_s=config.tpot_s)
    found = config.classes.get(name)
    if found is None:
        known = ", ".join(sorted(config.classes)) or "none"
        raise InvalidRequest(f"'{CLASS}': there is no class '{shown(name)}'; there are: {known}", param=CLASS)
    if not tenant.may_use(name):
        raise InvalidRequest(f"'{CLASS}': this key's tenant may not use '{shown(name)}'", param=CLASS)
    return found


def _seconds(headers: Mapping[str, str], header: str) -> float | None:
    text = headers.get(header)
    if text is None:
        return None
    try:
        value_ms = float(text)
    except ValueError:
        value_ms = math.nan
    if not 0 < value_ms <= MAX_MS:
        words = f"'{header}': expected milliseconds above 0 and at most {MAX_MS:.0f}, got '{shown(text)}'"
        raise InvalidRequest(words, param=header)
    return value_ms / 1e3


def _first(*values_s: float | None) -> float:
    return next((value_s for value_s in values_s if value_s is not None), math.inf)
