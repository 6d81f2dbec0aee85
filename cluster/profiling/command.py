"""`steelyard profile`: measures a live cluster, writes its profile, and says what is in it."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from rich.console import Console
from rich.text import Text

from cluster.profiling.as_profile import profile_of
from cluster.profiling.live import LiveCluster, Served
from cluster.profiling.measure import Report, measure
from cluster.profiling.observed import Observed
from cluster.profiling.progress import profile_progress
from cluster.simulator.service_times.profile import ProfiledStep, WorkerProfile, write_profile
from engine.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def profile(url: str, output: Path, device: str | None, console: Console) -> None:
    """Raises ApiError, and ConfigError where the file could not be written, before anything is measured."""
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"--output: {output} is no place for a file", param="--output")
    begun = time.perf_counter()
    with profile_progress(console) as report:
        served, observed = asyncio.run(_measured(url, report))
    found = profile_of(served, observed, device or device_at(url))
    write_profile(found, output)
    for line in told(found, output, time.perf_counter() - begun):
        console.print(Text(line), soft_wrap=True)


async def _measured(url: str, report: Report) -> tuple[Served, Observed]:
    async with LiveCluster(url) as cluster:
        return await measure(cluster, report)


def device_at(url: str) -> str:
    """What workers run on, as far as that can be known from here."""
    host = urlsplit(url).hostname
    return processor() if host in LOOPBACK else f"where {host} is"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def told(found: WorkerProfile, output: Path, took_s: float) -> list[str]:
    num_steps = sum(step.count for step in found.steps)
    prompts = [step for step in found.steps if len(step.chunks) == 1 and step.chunks[0][0] == 0]
    batches = [step for step in found.steps if not step.chunks]
    link, slowdown = found.link, found.slowdown
    return [
        f"{output}: {found.model} on {found.device}, {len(found.steps)} shapes of {num_steps} steps, in {took_s:.0f} s",
        f"  a step of so many prompt tokens   {_medians(prompts, lambda step: step.chunks[0][1])}",
        f"  a step of so many sequences       {_medians(batches, lambda step: step.num_decoding)}",
        f"  while the other worker computes   prefill x {slowdown.prefill:.2f}, decode x {slowdown.decode:.2f}",
        f"  outside of steps                  {found.gateway_ms:.1f} ms a request, {found.token_ms:.2f} ms a token",
        f"  hand-off                          {link.latency_ms:.1f} ms, then {link.gb_per_s:.2f} GB/s",
    ]


def _medians(steps: list[ProfiledStep], size_of: Callable[[ProfiledStep], int]) -> str:
    by_size: dict[int, list[float]] = {}
    for step in steps:
        by_size.setdefault(size_of(step), []).append(step.step_ms)
    return ", ".join(f"{size}: {median(ms):.0f} ms" for size, ms in sorted(by_size.items()))
