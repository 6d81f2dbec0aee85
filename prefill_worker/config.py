"""Config model of the prefill side of a worker (pydantic: from YAML)."""

from __future__ import annotations

from pydantic import Field

from engine.config import StrictModel


class PrefillConfig(StrictModel):
    """When prefill starts a request, and when it refuses one."""

    outbox_fraction: float = Field(
        default=0.3, gt=0, le=1, description="no request starts while unclaimed blocks exceed this part"
    )
    fetch_prefixes: bool = Field(
        default=True, description="copy a prompt's prefix from the worker that has it, where that beats computing it"
    )
    max_queue: int = Field(default=1024, ge=1, description="requests waiting for prefill; more are refused")
