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
    with _local_ray(config, verbose) if address is None else _attached_ray(config, address, verbose) as session:
        yield session


@contextmanager
def _attached_ray(config: ClusterConfig, address: str, verbose: bool) -> Iterator[RaySession]:
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, namespace=config.cluster.name, log_to_driver=verbose, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise Unavailable(f"cannot reach Ray at {address}: {_first_line(error)}{_auth_hint(error)}") from error
    try:
        yield RaySession(local=False, address=address)
    finally:
        ray.shutdown()


def _auth_hint(error: BaseException) -> str:
    if "auth" not in f"{type(error).__name__} {error}".lower():
        return ""
    return " (set RAY_AUTH_MODE, and RAY_AUTH_TOKEN with mode token, to what that Ray was started with)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- a local Ray ----------------------------------------------------------------------------------------------


@contextmanager
def _local_ray(config: ClusterConfig, verbose: bool) -> Iterator[RaySession]:
    with guarded_directory() as directory:
        os.environ.update(local_ray_environment(os.environ))
        import ray

        pools = (config.pools.prefill, config.pools.decode)
        custom: dict[str, float] = {}
        for pool in pools:
            for key, amount in pool.resources.items():
                custom[key] = custom.get(key, 0.0) + amount * pool.workers * pool.tensor_parallel
        try:
            ray.init(
                address="local",
                namespace=config.cluster.name,
                num_cpus=1 + math.ceil(sum(pool.num_cpus * pool.workers * pool.tensor_parallel for pool in pools)),
                resources=custom,
                object_store_memory=config.ray.object_store_memory_mb * 2**20,
                include_dashboard=config.ray.include_dashboard,
                log_to_driver=verbose,
                logging_level=logging.ERROR,
                _temp_dir=str(directory),
            )
            yield RaySession(local=True, address="local")
        finally:
            ray.shutdown()


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
