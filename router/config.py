"""Config model of the gateway and router (pydantic: from YAML)."""

from __future__ import annotations

import math

from pydantic import Field, PositiveFloat

from engine.config import StrictModel
from engine.types import Service
from router.face import CorsConfig, FaceTls
from router.policies import PolicyName


class ServiceClass(StrictModel):
    """What requests of a class are promised."""

    ttft_s: PositiveFloat | None = Field(default=None, description="null: no target")
    tpot_s: PositiveFloat | None = Field(default=None, description="null: no target")
    priority: int = Field(default=0, ge=0, le=100, description="higher numbers yield to lower ones")


CLASSES = {
    "interactive": ServiceClass(ttft_s=1.0, tpot_s=0.1),
    "standard": ServiceClass(ttft_s=5.0, tpot_s=0.2),
    "batch": ServiceClass(priority=10),
}


class TracingConfig(StrictModel):
    """Spans of requests, by OpenTelemetry."""

    endpoint: str = Field(
        default="", description="collector's base URL (OTLP over HTTP); empty: OTEL_EXPORTER_OTLP_ENDPOINT, or none"
    )
    sampling_ratio: float = Field(
        default=1.0, ge=0, le=1, description="share of requests traced, where their sender has not decided it"
    )


class RouterConfig(StrictModel):
    """The HTTP face and how requests are placed."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address the gateway binds to")
    port: int = Field(default=8000, ge=0, le=65535, description="0: the system chooses")
    gateways: int = Field(default=1, ge=1, le=64, description="processes that share the port")
    deadline_s: float = Field(default=600.0, gt=0, description="an accepted request ends before this")
    max_live_requests: int = Field(default=512, ge=1, description="more are refused with 429")
    max_connections: int = Field(default=2048, ge=1, description="further HTTP connections get 503 and are closed")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="larger HTTP bodies are refused with 413")
    grammar_compile_s: float = Field(
        default=2.0, gt=0, description="a schema, pattern or grammar that takes longer to try is refused with 400"
    )
    keys_file: str | None = Field(
        default=None, min_length=1, description="YAML of tenants and their hashed API keys; null: no keys are asked for"
    )
    keys_folder: str | None = Field(
        default=None, min_length=1, description="a file for each tenant, such as a mounted secret; beside keys_file"
    )
    open_paths: list[str] = Field(default=["/health", "/metrics", "/version"], description="routes that ask for no key")
    cors: CorsConfig = CorsConfig()
    tls: FaceTls = FaceTls()
    read_timeout_s: float = Field(default=30.0, gt=0, description="a request's head, then its body, arrive within this")
    write_timeout_s: float = Field(
        default=60.0, gt=0, description="a client that takes nothing of its answer for so long is let go"
    )
    drain_s: float = Field(default=10.0, ge=0, description="at the end, requests in progress may go on for this long")
    canary_s: float = Field(
        default=15.0, gt=0, description="a request goes through prefill, wire and decode at least this often"
    )
    rpc_timeout_s: float = Field(default=5.0, gt=0, description="deadline of one control call to a worker")
    policy: PolicyName = Field(default="slo", description="which workers serve a request, and whether")
    ttft_s: PositiveFloat | None = Field(default=None, description="first tokens are due by then; null: no target")
    tpot_s: PositiveFloat | None = Field(default=None, description="the most per further token; null: no target")
    classes: dict[str, ServiceClass] = Field(default=CLASSES, description="targets by the name of a service class")
    max_waiting: int = Field(default=256, ge=0, description="requests that wait at the gateway for room; more get 429")
    ledger_file: str = Field(
        default="", description="a line of JSON for every request that ended goes there; empty: none"
    )
    ledger_file_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="a larger one becomes FILE.1, in place of the one before"
    )
    tracing: TracingConfig = Field(default_factory=TracingConfig)
    max_attempts: int = Field(default=3, ge=1, description="placements of one request before it fails")
    max_stored_responses: int = Field(
        default=1024, ge=0, description="answers of /v1/responses that a gateway keeps; 0: none"
    )
    max_stored_bytes: int = Field(default=64 * 2**20, ge=0, description="of these, with their conversations")
    migrate_below: float = Field(
        default=0.05,
        ge=0,
        le=0.5,
        description="a decode worker with less of its KV blocks free gives requests away; 0: off",
    )
    back_up_below: float = Field(
        default=0.0, ge=0, le=0.5, description="with less free, requests are copied elsewhere before they move; 0: off"
    )

    @property
    def service(self) -> Service:
        """What is promised to a request that names nothing."""
        return Service(ttft_s=self.ttft_s or math.inf, tpot_s=self.tpot_s or math.inf)
