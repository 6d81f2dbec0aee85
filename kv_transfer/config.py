"""Config model of KV transfer (pydantic: from YAML)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config import StrictModel

MAX_FRAME_BYTES = 3 * 2**20  # gRPC refuses messages over 4 MiB; the rest is room for the record around the bytes


class TransferConfig(StrictModel):
    """How KV blocks move from one worker to another."""

    carrier: Literal["auto", "all", "grpc", "shm", "dist"] = Field(
        default="auto",
        description="what carries the bytes; auto: the fastest of grpc and shm, as measured between two workers; "
        "all: of dist, too",
    )
    min_gb_per_s: float = Field(
        default=0.0, ge=0, description="a carrier that was measured to be slower is not used between these two workers"
    )
    lease_ttl_s: float = Field(default=10.0, gt=0, description="blocks are freed so long after the last heartbeat")
    heartbeat_s: float = Field(default=2.0, gt=0, description="time between two heartbeats of a lease")
    frame_bytes: int = Field(default=2**20, ge=4096, le=MAX_FRAME_BYTES, description="most KV bytes in one frame")
    layer_group_bytes: int = Field(
        default=2**20, ge=0,
        description="KV leaves while its step is computed, by layers of so many bytes; 0, or on a GPU: after the step",
    )  # fmt: skip
    ring_bytes: int = Field(
        default=64 * 2**20, ge=1, description="host memory through which a pool is read that cannot be mapped"
    )
    pull_timeout_s: float = Field(default=30.0, gt=0, description="a pull that moves no frame for this long has failed")
    digests: bool = Field(default=True, description="each frame carries a digest that the reader checks")

    @property
    def carriers(self) -> tuple[str, ...]:
        """Those that may be used."""
        return {"auto": ("grpc", "shm"), "all": ("grpc", "shm", "dist")}.get(self.carrier, (self.carrier,))

    @model_validator(mode="after")
    def _survives_a_lost_heartbeat(self) -> TransferConfig:
        if self.heartbeat_s >= self.lease_ttl_s / 2:
            raise ValueError(
                f"heartbeat_s ({self.heartbeat_s:g}) must be less than half of lease_ttl_s ({self.lease_ttl_s:g}), "
                "or one lost heartbeat ends the lease"
            )
        if self.ring_bytes < 2 * self.frame_bytes:
            raise ValueError(f"ring_bytes ({self.ring_bytes}) must be at least twice frame_bytes ({self.frame_bytes})")
        return self
