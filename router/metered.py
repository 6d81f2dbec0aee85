"""Metered: the outputs of one request, which counts against its tenant's limits from its first wait to its end.

Generated tokens are charged where they are taken (`Generation.charge`): not all of them pass here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from engine.errors import InvalidRequest
from engine.types import Request, TokenOutput
from router.keyed import Caller
from router.text import Prepared


def as_tenant(prepared: Prepared, caller: Caller, num_answers: int) -> Prepared:
    """The requests as this tenant's. InvalidRequest for one that is longer than its limits."""
    limits = caller.tenant.limits
    _check("prompt tokens", sum(len(one.prompt_ids) for one in prepared.requests), limits.max_prompt_tokens, "prompt")
    num_tokens = num_answers * sum(one.sampling.max_tokens for one in prepared.requests)
    _check("tokens to generate", num_tokens, limits.max_tokens, "max_tokens")
    return replace(prepared, requests=tuple(_owned(one, caller) for one in prepared.requests))


async def metered(
    outputs: AsyncGenerator[TokenOutput], requests: Sequence[Request], caller: Caller
) -> AsyncGenerator[TokenOutput]:
    """Overloaded before the first output if the tenant has used up its share. A request counts once, whatever its n."""
    clock, ticket = asyncio.get_running_loop().time, object()
    async with aclosing(outputs):
        caller.quota.admit(ticket, sum(len(one.prompt_ids) for one in requests), clock())
        try:
            async for output in outputs:
                yield output
        finally:
            caller.quota.leave(ticket)


def _owned(request: Request, caller: Caller) -> Request:
    priority = max(request.service.priority, caller.tenant.priority)  # may yield more than its tenant does
    service = replace(request.service, tenant=caller.tenant.name, priority=priority)
    return replace(request, namespace=caller.namespace, service=service)


def _check(what: str, number: int, most: int | None, field: str) -> None:
    if most is not None and number > most:
        raise InvalidRequest(f"{number} {what}; this tenant may have {most} in one request", param=field)
