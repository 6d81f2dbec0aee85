"""Config model of the decode side of a worker (pydantic: from YAML)."""

from __future__ import annotations

from pydantic import Field

from engine.config import StrictModel


class DecodeConfig(StrictModel):
    """How many hand-offs arrive at once, and how long a sequence outlives its reader."""

    max_pulls: int = Field(default=16, ge=1, description="pulls at one time; more are refused, and come again")
    orphan_s: float = Field(default=30.0, ge=0, description="a sequence whose gateway is gone is kept this long")
