"""Ray's actors with plain types: make a detached named one, call it, kill it.

Ray's own annotations do not survive a type checker, so its dynamic calls are kept in these few lines.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, NewType, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Actor = NewType("Actor", object)


async def make_actor(kind: type, *args: object, name: str, namespace: str, **options: object) -> Actor:
    """A detached actor of that name; the living one, if there is one and `get_if_exists` is among the options."""

    def make() -> Actor:  # asks the control store, and blocks meanwhile
        made = ray.remote(kind).options(name=name, namespace=namespace, lifetime="detached", **cast(Any, options))
        return cast(Actor, made.remote(*args))

    return await asyncio.to_thread(make)


async def find_actor(name: str, namespace: str) -> Actor | None:
    try:
        return cast(Actor, await asyncio.to_thread(ray.get_actor, name, namespace))
    except ValueError:
        return None


async def call(actor: Actor, method: str, *args: object) -> Any:
    """Call a method and wait for what it returns. Raises RayActorError when the actor is gone."""
    return await getattr(cast(Any, actor), method).remote(*args)


def kill(actor: Actor) -> None:
    """End it for good. Killing a dead one is no error."""
    ray.kill(cast(Any, actor), no_restart=True)


def kill_by_prefix(prefix: str, namespace: str, *, but: str = "") -> None:
    """Kill every living actor of the namespace whose name begins so, except the one named `but`."""
    named = cast(list[dict[str, str]], ray.util.list_named_actors(all_namespaces=True))
    for name in (each["name"] for each in named if each["namespace"] == namespace):
        if name.startswith(prefix) and name != but:
            with suppress(ValueError):  # it ended meanwhile
                kill(cast(Actor, ray.get_actor(name, namespace)))


def this_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor beside the caller if that is possible."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
