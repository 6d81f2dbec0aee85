"""Config model of the controller (pydantic: from YAML)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from engine.config import StrictModel


class ScaleConfig(StrictModel):
    """How many workers there are: as many as the pools say, unless these say else."""

    min_workers: int | None = Field(default=None, ge=2, description="of both pools together; null: as the pools say")
    max_workers: int | None = Field(default=None, ge=2, description="of both pools together; null: as the pools say")
    goal: float = Field(
        default=0.95, gt=0, lt=1, description="share of requests predicted to keep its targets, below which more come"
    )
    spare: float = Field(
        default=1.2, ge=1, description="so many times the demand has to be met by one less before one leaves"
    )
    add_after_s: float = Field(default=30.0, ge=0, description="that there are too few, before more come")
    remove_after_s: float = Field(default=300.0, ge=0, description="that there is one too many, before it leaves")
    drain_s: float = Field(
        default=60.0, ge=0, description="one that leaves has so long for what it serves; the rest goes on elsewhere"
    )

    @property
    def is_on(self) -> bool:
        return self.min_workers != self.max_workers


class ControllerConfig(StrictModel):
    """When workers change their pools. Constants and where they come from: ARCHITECTURE.md, The controller."""

    mode: Literal["auto", "watch", "off"] = Field(
        default="auto", description="auto: flips workers; watch: decides and logs, changes nothing; off"
    )
    together: bool = Field(
        default=True,
        description="may all workers serve both phases, where no split does better? Only under the policy slo",
    )
    tick_s: float = Field(default=0.5, gt=0, description="from one decision to the next")
    window_s: float = Field(default=60.0, gt=0, description="of arrivals, for the lengths and the burstiness of demand")
    recent_s: float = Field(default=10.0, gt=0, description="the same in an emergency")
    bucket_s: float = Field(default=5.0, gt=0, description="of the series that are forecast")
    horizon_s: float = Field(
        default=30.0, gt=0, description="a flip has to pay within this; forecasts are so far ahead"
    )
    fewest: int = Field(default=20, ge=1, description="arrivals in the window, below which nothing is decided")
    dead_band: float = Field(default=0.02, ge=0, lt=1, description="attainment to gain, below which nothing is done")
    margin: float = Field(default=1.5, ge=1, description="by which the gain has to exceed the cost")
    confirmations: int = Field(
        default=6, ge=1, description="ticks in a row that have to wish for the same; one in need"
    )
    cooldown_s: float = Field(default=10.0, ge=0, description="after a flip, before the next one")
    way_back_s: float = Field(
        default=30.0, ge=0, description="the same before one of the same workers goes back: load is noise, too"
    )
    stale_s: float = Field(default=5.0, gt=0, description="what gateways said is believed for so long")
    evacuate_s: float = Field(
        default=0.5,
        ge=0,
        description="a flip waits so long for running sequences to move; the others move or end later",
    )
    flip_timeout_s: float = Field(default=10.0, gt=0, description="a flip that takes longer is undone")
    scale: ScaleConfig = ScaleConfig()
    journal_file: str = Field(default="", description="a line of JSON for every decision goes there; empty: none")
    journal_file_bytes: int = Field(
        default=64 * 2**20, ge=1024, description="a larger one becomes FILE.1, in place of the one before"
    )
