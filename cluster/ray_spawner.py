"""Processes as Ray actors: the Spawner of a real cluster.

1. Every worker has a placement group of its own, one bundle with what all its ranks take; it is kept over the worker's
   lives.
2. Every worker is a detached, named actor, whose ranks are its child processes. Asking for a name that lives hands that
   actor back, with its incarnation.
3. `close` goes by names alone, so that it also clears away what a dead supervisor knew of.
Calls of Ray's control store block, so they run in threads.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any, TypeVar, cast

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ClusterConfig, PoolConfig
from cluster.gateway_actor import GatewayActor
from cluster.ray_actors import Actor, call, kill, kill_by_prefix, make_actor, this_node
from cluster.spec import NAME_PREFIX, SUPERVISOR_NAME, Parts, WorkerSpec, actor_name
from cluster.worker_actor import WorkerActor
from engine.errors import Unavailable, WorkerLost, error_from_code
from engine.types import ErrorInfo, Role
from router.api import ControlView
from router.membership import Member, Membership
from router.policies.snapshot import Name
from router.report import GatewayReport

Answer = TypeVar("Answer")


class RayProcess:
    """The actor of one incarnation."""

    def __init__(self, actor: Actor, incarnation: str) -> None:
        self._actor = actor
        self._incarnation = incarnation

    @property
    def incarnation(self) -> str:
        return self._incarnation

    async def failed(self) -> str:
        try:
            return await call(self._actor, "failed")
        except RayActorError as error:
            return death_of(error)

    async def stop(self, polite_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(polite_s):
                await asyncio.gather(call(self._actor, "stop"), return_exceptions=True)
        await asyncio.to_thread(kill, self._actor)

    async def _ask(self, method: str, *args: object) -> Any:
        """Its answer. Raises what the part raised, or WorkerLost when the process ended."""
        try:
            return _unwrap(await call(self._actor, method, *args))
        except RayActorError as error:
            raise WorkerLost(death_of(error)) from None


class RayWorker(RayProcess):
    async def start(self) -> Member:
        return await self._ask("start")

    async def relabel(self, role: Role, role_epoch: int) -> None:
        await self._ask("relabel", role, role_epoch)

    async def member(self) -> Member:
        return await self._ask("member")

    async def num_open(self) -> int:
        return await self._ask("num_open")


class RayGateway(RayProcess):
    async def start(self) -> str:
        return await self._ask("start")

    async def version(self) -> int:
        return await self._ask("version")

    async def apply(self, membership: Membership) -> None:
        await self._ask("apply", membership)

    async def report(self, control: ControlView) -> GatewayReport:
        return await self._ask("report", control)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        return await self._ask("evacuate", worker, limit_s)

    async def ready(self) -> None:
        await self._ask("ready")


class RaySpawner:
    """The cluster's name is its namespace; whatever carries one of our names in it is ours."""

    def __init__(self, config: ClusterConfig, secret: bytes, parts: Parts) -> None:
        self._config = config
        self._secret = secret
        self._parts = parts
        self._namespace = config.cluster.name

    async def worker(self, spec: WorkerSpec, pool: PoolConfig) -> RayWorker:
        group = await self._place(spec.worker_id, pool)
        actor = await self._make_worker(spec, pool, group)
        return RayWorker(actor, await _incarnation_of(actor))

    async def gateway(self, name: str, incarnation: str, port: int) -> RayGateway:
        router = self._config.router.model_copy(update={"port": port})
        actor = await make_actor(
            GatewayActor,
            *(name, incarnation, self._config.model_copy(update={"router": router}), self._secret, self._parts.gateway),
            name=actor_name(name),
            namespace=self._namespace,
            get_if_exists=True,
            num_cpus=0,
            scheduling_strategy=this_node(),  # so that its URL stays the same, for all of them
        )
        return RayGateway(actor, await _incarnation_of(actor))

    async def living(self) -> list[str]:
        """By their placement groups, which they keep over their lives."""
        prefix = _group_name(self._namespace, "")
        names = await asyncio.to_thread(_group_names)
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))

    async def release(self, worker_id: str) -> None:
        await asyncio.to_thread(_remove_groups, _group_name(self._namespace, worker_id), whole=True)

    async def close(self) -> None:
        await asyncio.to_thread(remove_all, self._namespace)

    async def _make_worker(self, spec: WorkerSpec, pool: PoolConfig, group: PlacementGroup) -> Actor:
        return await make_actor(
            WorkerActor,
            *(spec, self._config, self._secret, self._parts.worker),
            name=actor_name(spec.worker_id),
            namespace=self._namespace,
            get_if_exists=True,
            num_cpus=pool.num_cpus * pool.tensor_parallel,
            num_gpus=pool.num_gpus * pool.tensor_parallel,
            resources={name: amount * pool.tensor_parallel for name, amount in pool.resources.items()},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )

    async def _place(self, worker_id: str, pool: PoolConfig) -> PlacementGroup:
        """The worker's placement group, once it has its resources. Raises Unavailable when there is no room."""
        rank = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
        bundle = {key: amount * pool.tensor_parallel for key, amount in rank.items() if amount}
        bundle = bundle or {"CPU": 0.001}  # an empty one is refused
        name = _group_name(self._namespace, worker_id)
        placing = asyncio.ensure_future(asyncio.to_thread(_find_or_place, name, bundle))
        try:
            group = await asyncio.shield(placing)
        except asyncio.CancelledError:  # whoever releases it must find it
            await asyncio.wait([placing])
            raise
        try:
            async with asyncio.timeout(self._config.cluster.start_timeout_s / 2):
                await cast(Any, group.ready())
        except TimeoutError:
            free = await asyncio.to_thread(ray.available_resources)
            asked = ", ".join(f"{amount:g} {key}, {free.get(key, 0):g} free" for key, amount in bundle.items())
            raise Unavailable(f"Ray has no room for {worker_id}: it asks for {asked}") from None
        return group


def remove_all(namespace: str) -> None:
    """Kill every actor and remove every placement group that carries one of our names, the supervisor excepted."""
    kill_by_prefix(NAME_PREFIX, namespace, but=SUPERVISOR_NAME)
    _remove_groups(_group_name(namespace, ""), whole=False)


def _remove_groups(name: str, whole: bool) -> None:
    """Those of this name, or whose name begins so."""
    for found in _group_names():
        if found == name if whole else found.startswith(name):
            with suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(ray.util.get_placement_group(found))


def _group_names() -> list[str]:
    """Of all that are there, or wait for room."""
    groups = cast(dict[str, dict[str, str]], placement_group_table())
    return [group["name"] for group in groups.values() if group["state"] != "REMOVED"]


def _group_name(namespace: str, worker_id: str) -> str:
    """Names of placement groups carry the namespace themselves, because Ray's table of them does not tell it."""
    return f"{namespace}.{NAME_PREFIX}{worker_id}"


def _find_or_place(name: str, bundle: dict[str, float]) -> PlacementGroup:
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return placement_group([bundle], strategy="STRICT_PACK", name=name, lifetime="detached")


async def _incarnation_of(actor: Actor) -> str:
    try:
        return await call(actor, "incarnation")
    except RayActorError as error:
        raise WorkerLost(death_of(error)) from None


def death_of(error: RayActorError) -> str:
    """Ray's long account of an actor's death in one line."""
    text = str(error).strip()
    if "creation task" in text:  # the constructor raised: the last line names the fault
        return text.splitlines()[-1]
    detail = re.search(r"exit detail: (.+?)(?:\. |\n|$)", text)
    return f"its process ended ({detail.group(1)})" if detail else text.splitlines()[0]


def _unwrap(answer: Answer | ErrorInfo) -> Answer:
    if isinstance(answer, ErrorInfo):
        raise error_from_code(answer.code, answer.message)
    return answer
