"""Config model of the gateway and router (pydantic: from YAML)."""

from __future__ import annotations

from pydantic import Field

from engine.config import StrictModel


class RouterConfig(StrictModel):
    """The HTTP face and how requests are placed."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address the gateway binds to")
    port: int = Field(default=8000, ge=0, le=65535, description="0: the system chooses")
    deadline_s: float = Field(default=600.0, gt=0, description="an accepted request ends before this")
    max_live_requests: int = Field(default=512, ge=1, description="more are refused with 429")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="larger HTTP bodies are refused with 413")
    canary_s: float = Field(
        default=15.0, gt=0, description="a request goes through prefill, wire and decode at least this often"
    )
    rpc_timeout_s: float = Field(default=5.0, gt=0, description="deadline of one control call to a worker")
    max_attempts: int = Field(default=3, ge=1, description="placements of one request before it fails")
