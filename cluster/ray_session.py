"""The Ray that a command runs on: one that is there already, or a local one that ends with this process.

Which one: `ray.address` of the YAML, else RAY_ADDRESS (which `ray job submit` sets), else a local one.

A local Ray listens on ports of this machine, so it always has token authentication, with a token of its own, unless
the user has chosen otherwise through RAY_AUTH_MODE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; left alone, Ray would write
a token into the user's home. Whoever attaches to a running Ray needs the same variables as the one who started it.
Ray reads them when it is first imported, so nothing may import it before `ray_session`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import guard
from cluster.config import ClusterConfig
from engine.errors import ConfigError, Unavailable

GUARD_S = 15.0
MAX_TEMP_DIR = 40  # Ray puts sockets below it, whose paths may have 107 characters


@dataclass(frozen=True, slots=True)
class RaySession:
    """`local`: started here, on this machine only, and gone when the session ends."""

    local: bool
    address: str


def ray_address(config: ClusterConfig, environ: Mapping[str, str]) -> str | None:
    """Where to attach; None stands for a local Ray."""
    return config.ray.address or environ.get("RAY_ADDRESS") or None


def local_ray_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that a local Ray needs and the user has not set."""
    wanted = {"RAY_USAGE_STATS_ENABLED": "0"}
    if "RAY_AUTH_MODE" not in environ:
        wanted["RAY_AUTH_MODE"] = "token"
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(environ):
            wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return {name: value for name, value in wanted.items() if name not in environ}


@contextmanager
def ray_session(config: ClusterConfig, *, verbose: bool = False) -> Iterator[RaySession]:
    """Attach to Ray or start it, and leave it or end it. Raises Unavailable when it cannot be reached."""
    address = ray_address(config, os.environ)
    if address is None and config.cluster.lifetime == "detached":
        raise ConfigError(
            "cluster.lifetime: detached needs a Ray that outlives this command; set ray.address, or RAY_ADDRESS, "
            "or use `ray job submit`"
        )
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"ray.address: {address} is for Ray Client; give the head's host:port, or use `ray job submit`"
        )
    with _local_ray(config, verbose) if address is None else _attached_ray(config, address, verbose) as session:
        yield session


@contextmanager
def _attached_ray(config: ClusterConfig, address: str, verbose: bool) -> Iterator[RaySession]:
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, namespace=config.cluster.name, log_to_driver=verbose, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise Unavailable(_unreachable(address, error)) from error
    try:
        yield RaySession(local=False, address=address)
    finally:
        ray.shutdown()


def _unreachable(address: str, error: BaseException) -> str:
    """Ray says neither of these two things: a refused token looks to it like a head that is not there."""
    if address == "auto":
        return "no Ray runs on this machine; set ray.address or RAY_ADDRESS for one that runs elsewhere"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    advice = "is it up, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN as they were when it was started?"
    return f"cannot reach Ray at {address}: {reason}; {advice}"


# --- a local Ray ----------------------------------------------------------------------------------------------


@contextmanager
def _local_ray(config: ClusterConfig, verbose: bool) -> Iterator[RaySession]:
    with guarded_directory() as directory:
        os.environ.update(local_ray_environment(os.environ))
        import ray

        asked = _at_most(config)
        custom = {key: amount for key, amount in asked.items() if key not in ("CPU", "GPU")}
        try:
            ray.init(
                address="local",
                namespace=config.cluster.name,
                num_cpus=1 + math.ceil(asked["CPU"]),
                resources=custom,
                object_store_memory=config.ray.object_store_memory_mb * 2**20,
                include_dashboard=config.ray.include_dashboard,
                log_to_driver=verbose,
                logging_level=logging.ERROR,
                _temp_dir=str(directory),
            )
            _require_gpus(config, ray.cluster_resources().get("GPU", 0.0))
            yield RaySession(local=True, address="local")
        finally:
            ray.shutdown()


def _resources_of(config: ClusterConfig) -> dict[str, float]:
    """What all workers together ask of Ray."""
    asked: dict[str, float] = {}
    for pool in (config.pools.prefill, config.pools.decode):
        for key, amount in {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}.items():
            asked[key] = asked.get(key, 0.0) + amount * pool.workers * pool.tensor_parallel
    return asked


def _at_most(config: ClusterConfig) -> dict[str, float]:
    """The same when as many have come as may, each of them the larger of both pools' kinds."""
    asked = _resources_of(config)
    num_more = (config.controller_rules.scale.max_workers or config.num_workers) - config.num_workers
    pools = (config.pools.prefill, config.pools.decode)
    for key in asked:
        each = [{"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}.get(key, 0.0) * pool.tensor_parallel
                for pool in pools]  # fmt: skip
        asked[key] += num_more * max(each)
    return asked


def _require_gpus(config: ClusterConfig, found: float) -> None:
    """CPUs and custom resources of a local Ray are as many as are asked for; GPUs are those that there are."""
    asked = _resources_of(config)["GPU"]
    if asked > found:
        raise ConfigError(f"pools: the workers ask for {asked:g} GPUs, this machine has {found:g}")


@contextmanager
def guarded_directory() -> Iterator[Path]:
    """A temporary directory for a local Ray; at the end, or if we are killed, it and all that uses it is gone."""
    base = tempfile.gettempdir()
    directory = Path(tempfile.mkdtemp(prefix="steelyard-", dir=base if len(base) <= MAX_TEMP_DIR else "/tmp"))
    command = [sys.executable, "-I", "-S", guard.__file__, str(directory), str(os.getpid())]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ["STEELYARD_RAY_DIR"] = str(directory)  # marks every process of this Ray for the guard
    try:
        yield directory
    finally:
        del os.environ["STEELYARD_RAY_DIR"]
        watch.communicate(timeout=GUARD_S)
