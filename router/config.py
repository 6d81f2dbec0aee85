"""Config model of the gateway and router (pydantic: from YAML)."""

from __future__ import annotations

from pydantic import Field

from engine.config import StrictModel
from router.policy import Policy


class RouterConfig(StrictModel):
    """The HTTP face and how requests are placed."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address the gateway binds to")
    port: int = Field(default=8000, ge=0, le=65535, description="0: the system chooses")
    deadline_s: float = Field(default=600.0, gt=0, description="an accepted request ends before this")
    max_live_requests: int = Field(default=512, ge=1, description="more are refused with 429")
    max_connections: int = Field(default=2048, ge=1, description="further HTTP connections get 503 and are closed")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="larger HTTP bodies are refused with 413")
    read_timeout_s: float = Field(default=30.0, gt=0, description="a request's head, then its body, arrive within this")
    write_timeout_s: float = Field(
        default=60.0, gt=0, description="a client that takes nothing of its answer for so long is let go"
    )
    drain_s: float = Field(default=10.0, ge=0, description="at the end, requests in progress may go on for this long")
    canary_s: float = Field(
        default=15.0, gt=0, description="a request goes through prefill, wire and decode at least this often"
    )
    rpc_timeout_s: float = Field(default=5.0, gt=0, description="deadline of one control call to a worker")
    policy: Policy = Field(
        default="least_work", description="least_work, or round_robin as a yardstick for comparisons"
    )
    max_attempts: int = Field(default=3, ge=1, description="placements of one request before it fails")
    migrate_below: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="a decode worker with less of its KV blocks free gives requests away; 0: off",
    )
    back_up_below: float = Field(
        default=0.0, ge=0, le=0.5, description="with less free, requests are copied elsewhere before they move; 0: off"
    )
