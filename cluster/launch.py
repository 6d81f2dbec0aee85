"""`steelyard serve` and `steelyard stop`: Ray, the model's files, the supervisor, and the end of all of them.

1. Ray is attached to or started (ray_session.py). With a local one the model's files are pulled here, once.
2. The driver (driver.py) has the supervisor start everything, prints what a user needs, and holds the cluster.
3. Ctrl-C, SIGTERM (`ray job stop`) or the cluster's own end: everything is stopped. A second signal stops waiting.
If this process is killed, the supervisor ends the cluster when the lease runs out, and a local Ray's guard ends Ray.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import cast

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.progress import Steps
from cluster.pull_progress import share
from cluster.ray_session import RaySession, ray_address, ray_session
from cluster.spec import Parts, load_part
from engine.errors import ConfigError

INTERRUPTED = 130
MIN_SECRET = 16
REAL_PARTS = Parts()

Resolve = Callable[[str, Path | None, Callable[[str, int, int], None]], object]


def serve(config: ClusterConfig, console: Console, *, parts: Parts = REAL_PARTS, verbose: bool = False) -> int:
    """Run until stopped; returns the exit code. `console` must have a file of its own, not sys.stdout of the moment.

    Raises SteelyardError when the cluster cannot be had, or failed.
    """
    secret = cluster_secret()
    steps = Steps(console)
    try:
        starts_ray = ray_address(config, os.environ) is None
        with _interrupts(deferred=starts_ray) as raise_deferred, _without_ray_messages(verbose), ExitStack() as undo:
            session = _start_ray(config, verbose, steps, undo)
            raise_deferred()
            if session.local:
                _pull_model(config, parts, steps)
            from cluster.driver import Driver

            return asyncio.run(Driver(config, parts, secret, steps, local=session.local).run())
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED


def stop(config: ClusterConfig) -> bool:
    """Stop a cluster that runs on the Ray of this machine or of the config; False if none of its name does."""
    address = ray_address(config, os.environ) or "auto"
    attached = config.model_copy(update={"ray": config.ray.model_copy(update={"address": address})})
    with ray_session(attached):
        from cluster.driver import stop_cluster

        return asyncio.run(stop_cluster(config.cluster.name))


def cluster_secret() -> bytes:
    """What all RPCs of the cluster carry: STEELYARD_SECRET, else a new one. Never logged."""
    given = os.environ.get("STEELYARD_SECRET")
    if given is not None and len(given) < MIN_SECRET:
        raise ConfigError(f"STEELYARD_SECRET must have at least {MIN_SECRET} characters")
    return given.encode() if given else secrets.token_bytes(32)


def _start_ray(config: ClusterConfig, verbose: bool, steps: Steps, undo: ExitStack) -> RaySession:
    with steps.step("Ray") as note:
        session = undo.enter_context(ray_session(config, verbose=verbose))
        note("started for this cluster" if session.local else f"attached to {session.address}")
    return session


def _pull_model(config: ClusterConfig, parts: Parts, steps: Steps) -> None:
    """Workers of a local Ray share this machine's cache: one pull, with its progress shown, serves them all."""
    resolve = cast(Resolve, load_part(parts.resolve))
    cache_dir = Path(config.model.cache_dir).expanduser() if config.model.cache_dir else None
    with steps.step("Model files") as note:
        resolve(config.model.name, cache_dir, lambda stage, done, total: note(share(stage, done, total)))
        note(config.model.name)


@contextmanager
def _interrupts(deferred: bool) -> Iterator[Callable[[], None]]:
    """While no event loop runs, SIGTERM ends us as Ctrl-C does. A first one that is `deferred` is raised when the
    yielded function is called: Ray swallows it while it starts, or crashes of it. That function is to be called in any
    case, because Ray puts handlers of its own in."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    came = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        is_first, came = not came, True
        if not (deferred and is_first):
            raise KeyboardInterrupt

    def catch() -> None:
        for number in signals:
            signal.signal(number, interrupt)

    def raise_deferred() -> None:
        nonlocal deferred
        deferred = False
        catch()
        if came:
            raise KeyboardInterrupt

    catch()
    try:
        yield raise_deferred
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _without_ray_messages(verbose: bool) -> Iterator[None]:
    """Ray prints long notes of its own about workers that ended; the supervisor says the same in a line."""
    if verbose:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
