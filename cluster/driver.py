"""The process that holds a cluster: it makes the supervisor, follows it, and has it end everything.

`follow` is both our view and our heartbeat: while we call it, the lease of a `job` cluster is renewed. A supervisor
that is being restarted by Ray is waited for; one that is gone for good ends the hold.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

import httpx
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from cluster.config import ClusterConfig
from cluster.listener import require_free
from cluster.progress import Note, Steps, how_to_stop, show_ready
from cluster.ray_actors import Actor, call, find_actor, kill, make_actor, this_node
from cluster.ray_spawner import remove_all
from cluster.spec import SUPERVISOR_NAME, ClusterStatus, Parts, Phase, UnitState, UnitStatus
from cluster.supervisor_actor import SupervisorActor
from engine.errors import ConfigError, Unavailable, error_from_code

FOLLOW_S = 1.0
ANSWER_S = 10.0  # more than FOLLOW_S by what a busy machine may need
RETRY_S = 0.2
GONE_S = 30.0  # a supervisor that has not answered for so long is not coming back
STOP_SLACK_S = 3.0  # beyond the supervisor's own limit
INTERRUPTED = 130

Result = TypeVar("Result")


class Driver:
    """`run` once per process, in its main thread, with Ray initialised."""

    def __init__(self, config: ClusterConfig, parts: Parts, secret: bytes, steps: Steps, *, local: bool) -> None:
        self._config = config
        self._parts = parts
        self._secret = secret
        self._steps = steps
        self._local = local
        self._interrupted = asyncio.Event()
        self._forced = asyncio.Event()
        self._last: ClusterStatus | None = None

    async def run(self) -> int:
        """Returns the exit code. Raises SteelyardError when the cluster did not start, or failed."""
        with self._signals():
            supervisor = await self._make_supervisor()
            keep = False
            try:
                ready = await _unless(self._interrupted, self._until_ready(supervisor))
                if ready is None:
                    return INTERRUPTED
                await self._show(ready)
                keep = self._config.cluster.lifetime == "detached"
                if not keep:
                    await _unless(self._interrupted, self._hold(supervisor, ready))
                return 0
            finally:
                if not keep:
                    await self._end(supervisor)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the cluster, the second one ends it by force."""

        def interrupt() -> None:
            (self._forced if self._interrupted.is_set() else self._interrupted).set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def _make_supervisor(self) -> Actor:
        name = self._config.cluster.name
        if not self._local and not await make_room(name):
            raise ConfigError(f"cluster.name: {name!r} already runs on this Ray; stop it, or choose another name")
        router = self._config.router
        if router.gateways > 1 and router.port:
            require_free(router.host, router.port)
        return await make_actor(
            SupervisorActor,
            *(self._config, self._secret, self._parts, self._local),
            name=SUPERVISOR_NAME,
            namespace=name,
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=this_node(),
        )

    async def _until_ready(self, supervisor: Actor) -> ClusterStatus:
        """Show the three steps, which go on beside each other, in the order in which they can end."""
        with self._steps.step("Workers") as note:
            await self._until(supervisor, lambda status: all(map(_is_running, status.workers)), note)
        with self._steps.step("Gateway") as note:
            await self._until(supervisor, lambda status: all(map(_is_running, status.gateways)), note)
        with self._steps.step("First canary") as note:
            return await self._until(supervisor, lambda status: status.phase == Phase.READY, note)

    async def _until(self, supervisor: Actor, done: Callable[[ClusterStatus], bool], note: Note) -> ClusterStatus:
        while True:
            status = self._last or await self._follow(supervisor)
            _require_alive(status)
            units = [unit for unit in (*status.workers, *status.gateways) if not _is_running(unit)]
            note(", ".join(map(_describe, units)))
            if done(status):
                note("")
                return status
            await self._follow(supervisor)

    async def _show(self, ready: ClusterStatus) -> None:
        url = ready.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
        pools = (("prefill worker", self._config.pools.prefill), ("decode worker", self._config.pools.decode))
        show_ready(
            self._steps.console,
            url=url,
            model=await _served_model(url) or self._config.model.served_name or self._config.model.name,
            workers=" and ".join(_count(pool.workers, kind) for kind, pool in pools),
            total_s=self._steps.total_s,
            how_to_stop=how_to_stop(self._config.cluster.name, self._config.cluster.lifetime == "detached"),
        )

    async def _hold(self, supervisor: Actor, ready: ClusterStatus) -> None:
        """Say what changes; return when someone else stopped the cluster."""
        before = ready
        while True:
            status = await self._follow(supervisor)
            for words in _changes((*before.workers, *before.gateways), (*status.workers, *status.gateways)):
                self._steps.say(words)
            if status.phase in (Phase.STOPPING, Phase.STOPPED) and status.failure is None:
                self._steps.say("the cluster was stopped")
                return
            _require_alive(status)
            before = status

    async def _follow(self, supervisor: Actor) -> ClusterStatus:
        """The next status; returns the same one again after a while, because this is our heartbeat too."""
        seen = self._last.sequence if self._last else -1
        limit_s = min(FOLLOW_S, self._config.cluster.driver_lease_s / 4)
        try:
            async with asyncio.timeout(GONE_S):
                while True:
                    with suppress(ActorUnavailableError, TimeoutError):  # it is being restarted
                        async with asyncio.timeout(ANSWER_S):
                            self._last = cast(ClusterStatus, await call(supervisor, "follow", seen, limit_s))
                            return self._last
                    await asyncio.sleep(RETRY_S)
        except (RayError, TimeoutError) as error:
            raise Unavailable(f"the cluster's supervisor is gone: {error or 'it does not answer'}") from error

    async def _end(self, supervisor: Actor) -> None:
        """Have everything stopped; by force if we are told to, or if the supervisor cannot do it."""
        with self._steps.step("Stopping"):
            await _unless(self._forced, _stop_supervisor(supervisor))
            await asyncio.to_thread(_remove_cluster, supervisor, self._config.cluster.name)


async def make_room(name: str) -> bool:
    """Whether no cluster of that name runs; what a driver left without an end is ended first."""
    supervisor = await find_actor(SUPERVISOR_NAME, name)
    with suppress(RayActorError):  # it is just ending itself
        if supervisor is not None and not await call(supervisor, "is_abandoned"):
            return False
    await stop_cluster(name)
    return True


async def stop_cluster(name: str) -> bool:
    """End the cluster of that name on this Ray; False if there is none."""
    supervisor = await find_actor(SUPERVISOR_NAME, name)
    if supervisor is not None:
        await _stop_supervisor(supervisor)
    await asyncio.to_thread(_remove_cluster, supervisor, name)
    return supervisor is not None


async def _stop_supervisor(supervisor: Actor) -> None:
    """Wait for as long as this cluster's configuration lets it take; the supervisor knows that, we may not."""
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            limit_s = await call(supervisor, "stop_limit_s")
        async with asyncio.timeout(limit_s + STOP_SLACK_S):
            await call(supervisor, "stop")


def _remove_cluster(supervisor: Actor | None, name: str) -> None:
    """Kill what is left of a cluster, its supervisor first, because that would make the others anew."""
    if supervisor is not None:
        kill(supervisor)
    remove_all(name)


async def _unless(event: asyncio.Event, work: Coroutine[None, None, Result]) -> Result | None:
    """The work's result, or None if the event comes first; the work is then cancelled."""
    task, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, waiting):
            each.cancel()
        await asyncio.gather(task, waiting, return_exceptions=True)


async def _served_model(url: str) -> str | None:
    """The model's name as the API has it; None if the API does not say."""
    try:
        async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as client:
            return (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None


def _require_alive(status: ClusterStatus) -> None:
    if status.failure is not None:
        raise error_from_code(status.failure.code, status.failure.message)
    if status.phase in (Phase.STOPPING, Phase.STOPPED):
        raise Unavailable("the cluster was stopped while it started")


def _is_running(unit: UnitStatus) -> bool:
    return unit.state == UnitState.RUNNING


def _changes(before: Sequence[UnitStatus], now: Sequence[UnitStatus]) -> Iterator[str]:
    old = {unit.name: unit for unit in before}
    for unit in now:
        was = old.pop(unit.name, None)
        if was is None or (was.state, was.incarnation) != (unit.state, unit.incarnation):
            yield _describe(unit)
        elif was.role and unit.role and was.role != unit.role:
            yield f"{unit.name} now serves the {unit.role} pool"
    yield from (f"{name} has left" for name in old)


def _describe(unit: UnitStatus) -> str:
    reason = f": {unit.reason}" if unit.reason and not _is_running(unit) else ""
    return f"{unit.name} {unit.state}{reason}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
