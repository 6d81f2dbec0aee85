"""The supervisor alone: processes are small objects that the test ends by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import pytest

from cluster.config import ClusterConfig, ClusterSection, PoolConfig, PoolsSection
from cluster.control.rules import ControllerConfig
from cluster.end_limits import EndLimits, end_limits
from cluster.incarnation import Incarnation
from cluster.spec import Phase, UnitState, WorkerSpec
from cluster.supervisor import MAX_BACKOFF_S, MAX_FIRST_ATTEMPTS, Supervisor, backoff_s
from engine.errors import ConfigError, ModelError, WorkerLost
from engine.types import ErrorInfo, Role
from router.api import ControlView
from router.config import RouterConfig
from router.membership import Member, Membership
from router.policies.snapshot import Name
from router.report import GatewayReport
from tests.cluster.control.cases import pools, steady, table


class FakeProcess:
    """One incarnation; the test ends it."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.num_stops = 0

    @property
    def incarnation(self) -> str:
        return self._incarnation

    def end(self, reason: str) -> None:
        self._ended.set_result(reason)

    async def failed(self) -> str:
        return await asyncio.shield(self._ended)

    async def stop(self, polite_s: float) -> None:
        self.num_stops += 1


class FakeWorkerProcess(FakeProcess):
    def __init__(self, spec: WorkerSpec, fault: Exception | None) -> None:
        super().__init__(spec.incarnation)
        self.spec = spec
        self.now: Member | None = None  # by its own word
        self.open_now = 0
        self._fault = fault

    async def start(self) -> Member:
        if self._fault is not None:
            raise self._fault
        begun = Member(self.spec.worker_id, self.incarnation, self.spec.role, 0, "127.0.0.1:1", "same")
        self.now = self.now or begun
        return begun

    async def relabel(self, role: Role, role_epoch: int) -> None:
        assert self.now is not None
        self.now = replace(self.now, role=role, role_epoch=role_epoch)

    async def member(self) -> Member:
        assert self.now is not None
        return self.now

    async def num_open(self) -> int:
        return self.open_now


class FakeGatewayProcess(FakeProcess):
    """`held` is the version that it got from an earlier supervisor."""

    def __init__(self, incarnation: str, port: int, held: int, fault: Exception | None) -> None:
        super().__init__(incarnation)
        self.port = port or 4321
        self.asked_port = port
        self.held = held
        self.applied: list[Membership] = []
        self._fault = fault
        self._canary = asyncio.Event()
        self.views: list[ControlView] = []
        self.told: Callable[[], GatewayReport] | None = None
        self.evacuated: list[Name] = []
        self.left = 0  # requests, on a worker that is evacuated
        self.on_stop: Callable[[float], None] = lambda polite_s: None

    async def start(self) -> str:
        if self._fault is not None:
            raise self._fault
        return f"http://127.0.0.1:{self.port}"

    async def version(self) -> int:
        return self.held

    async def apply(self, membership: Membership) -> None:
        self.applied.append(membership)
        if len(membership.members) >= 2:
            self._canary.set()

    async def report(self, control: ControlView) -> GatewayReport:
        self.views.append(control)
        return self.told() if self.told is not None else GatewayReport("g", 0.0, (), (), (), (), 0.0, 16, 16)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        self.evacuated.append(worker)
        return self.left

    async def ready(self) -> None:
        await self._canary.wait()

    async def stop(self, polite_s: float) -> None:
        await super().stop(polite_s)
        self.on_stop(polite_s)


class FakeSpawner:
    def __init__(self) -> None:
        self.workers: list[FakeWorkerProcess] = []
        self.gateways: list[FakeGatewayProcess] = []
        self.num_closes = 0
        self.held = 0
        self.worker_fault: Exception | None = None
        self.gateway_fault: Exception | None = None
        self.hangs = False
        self.released: list[str] = []

    async def worker(self, spec: WorkerSpec, pool: PoolConfig) -> FakeWorkerProcess:
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        self.workers.append(FakeWorkerProcess(spec, self.worker_fault))
        return self.workers[-1]

    async def gateway(self, name: str, incarnation: str, port: int) -> FakeGatewayProcess:
        self.gateways.append(FakeGatewayProcess(incarnation, port, self.held, self.gateway_fault))
        return self.gateways[-1]

    async def living(self) -> list[str]:
        return []

    async def release(self, worker_id: str) -> None:
        self.released.append(worker_id)

    async def close(self) -> None:
        self.num_closes += 1

    def latest(self, worker_id: str) -> FakeWorkerProcess:
        return [worker for worker in self.workers if worker.spec.worker_id == worker_id][-1]


class AdoptingSpawner(FakeSpawner):
    """Hands back what another one has made."""

    def __init__(self, other: FakeSpawner) -> None:
        super().__init__()
        self._other = other

    async def worker(self, spec: WorkerSpec, pool: PoolConfig) -> FakeWorkerProcess:
        self.workers.append(self._other.latest(spec.worker_id))
        return self.workers[-1]

    async def living(self) -> list[str]:
        return [worker.spec.worker_id for worker in self._other.workers if not worker.num_stops]


def make_config(gateways: int = 1, scale: object = None, **cluster: object) -> ClusterConfig:
    section = ClusterSection.model_validate({"start_timeout_s": 5.0, **cluster})
    pools = PoolsSection(prefill=PoolConfig(workers=1), decode=PoolConfig(workers=2))
    settings = {"tick_s": 0.02, "fewest": 5, "cooldown_s": 0.2, "confirmations": 2, "scale": scale or {}}
    controller = ControllerConfig.model_validate(settings)
    router = RouterConfig(port=0, gateways=gateways)
    return ClusterConfig(cluster=section, router=router, pools=pools, controller=controller)


@asynccontextmanager
async def running(
    spawner: FakeSpawner, limits: EndLimits | None = None, gateways: int = 1, scale: object = None, **cluster: object
) -> AsyncIterator[Supervisor]:
    """A supervisor with one prefill and two decode workers, stopped at the end."""
    names = (f"incarnation-{number}" for number in count())
    supervisor = Supervisor(
        make_config(gateways, scale, **cluster),
        spawner,
        loopback=True,
        new_incarnation=lambda: next(names),
        limits=limits,
    )
    life = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        await supervisor.stop()
        await life


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 (it looks from outside, where no event is set)
            await asyncio.sleep(0.005)


def is_ready(supervisor: Supervisor) -> Callable[[], bool]:
    def all_there() -> bool:
        status = supervisor.status()
        units = (*status.workers, *status.gateways)
        return status.phase == Phase.READY and all(unit.state == UnitState.RUNNING for unit in units)

    return all_there


async def test_a_cluster_becomes_ready_when_all_are_listed_and_a_canary_came_back() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        members = supervisor.membership().members
        assert [member.worker_id for member in members] == ["prefill-0", "decode-0", "decode-1"]
        assert supervisor.membership().by_role(Role.DECODE) == members[1:]
        assert supervisor.status().url == "http://127.0.0.1:4321"
        assert {worker.spec.host for worker in spawner.workers} == {"127.0.0.1"}
        await until(lambda: spawner.gateways[0].applied[-1] == supervisor.membership())


async def test_a_worker_that_ends_is_unlisted_at_once_and_comes_back_as_a_new_incarnation() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        before, first = supervisor.membership(), spawner.latest("decode-1")
        first.end("its engine died")
        await until(lambda: supervisor.membership().version > before.version, limit_s=0.2)
        gone = supervisor.membership()
        assert gone == Membership(before.version + 1, before.members[:2])
        assert supervisor.status().workers[2].reason == "its engine died"
        await until(is_ready(supervisor))
        again = supervisor.membership()
        assert again.version == gone.version + 1
        assert again.members[2].worker_id == "decode-1"
        assert again.members[2].incarnation != before.members[2].incarnation
        assert first.num_stops == 1, "what is left of the old incarnation is cleared away"
        assert supervisor.status().workers[2].num_restarts == 1
        await until(lambda: spawner.gateways[0].applied[-2:] == [gone, again])


async def test_versions_that_a_gateway_sees_only_rise() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        for worker_id in ("prefill-0", "decode-0", "decode-1"):
            await until(is_ready(supervisor))
            spawner.latest(worker_id).end("killed")
            await until(lambda: not is_ready(supervisor)())
        await until(is_ready(supervisor))
        await until(lambda: spawner.gateways[0].applied[-1] == supervisor.membership())
        versions = [membership.version for membership in spawner.gateways[0].applied]
        assert versions == sorted(set(versions))


async def test_a_new_gateway_listens_on_the_same_port_and_gets_the_membership() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        spawner.gateways[0].end("killed")
        await until(lambda: len(spawner.gateways) == 2 and bool(spawner.gateways[1].applied))
        assert [gateway.asked_port for gateway in spawner.gateways] == [0, 4321]
        assert spawner.gateways[1].applied == [supervisor.membership()]


async def test_a_restarted_supervisor_goes_above_the_version_that_its_gateway_holds() -> None:
    spawner = FakeSpawner()
    spawner.held = 17
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        await until(lambda: bool(spawner.gateways[0].applied))
        first = spawner.gateways[0].applied[0]
        assert first.version > 17
        assert len(first.members) == 3, "no worker that lives is unlisted for a moment"


def long_prompts(supervisor: Supervisor, rate: float = 4.0) -> GatewayReport:
    """What a gateway tells of that calls for more prefill workers: more prompts than one can compute."""
    now = asyncio.get_running_loop().time()
    came = steady(rate, now - 0.02, now + 0.5, num_prompt=8000, num_output=5.0, ttft_s=5.0)
    members = supervisor.membership().members
    workers = tuple(
        replace(stand, worker_id=member.worker_id, incarnation=member.incarnation, cohort=member.cohort)
        for stand, member in zip(pools(1, len(members) - 1), members, strict=True)
    )
    return GatewayReport("g", now, came, (), workers, (("same", table()),), 0.0, 16, 128)


async def test_the_controller_flips_a_worker_and_every_gateway_gets_to_know() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        spawner.gateways[0].told = lambda: long_prompts(supervisor)
        await until(lambda: len(supervisor.membership().by_role(Role.PREFILL)) == 2)
        flipped = next(one for one in supervisor.membership().members if one.role_epoch)
        assert flipped.worker_id.startswith("decode-")
        assert spawner.latest(flipped.worker_id).now == flipped
        assert spawner.gateways[0].evacuated == [flipped.name]
        await until(lambda: spawner.gateways[0].applied[-1] == supervisor.membership())
        left = [one for each in spawner.gateways[0].applied for one in each.members if one.is_leaving]
        assert {one.worker_id for one in left} == {flipped.worker_id}
        await until(lambda: spawner.gateways[0].views[-1].num_flips == 1)
        await asyncio.sleep(0.3)
        assert len(supervisor.membership().by_role(Role.DECODE)) == 1, "each pool keeps one"


async def test_a_restarted_supervisor_takes_a_flipped_worker_for_what_it_is() -> None:
    """Its actor lives and answers as it began; only its own word now says the role."""
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        worker = spawner.latest("decode-1")
        await worker.relabel(Role.PREFILL, 1)
        adopted = AdoptingSpawner(spawner)
        async with running(adopted) as second:
            await until(is_ready(second))
            assert [one.worker_id for one in second.membership().by_role(Role.PREFILL)] == ["prefill-0", "decode-1"]


# --- workers that come and leave ------------------------------------------------------------------------------


def ids(supervisor: Supervisor) -> list[str]:
    return [member.worker_id for member in supervisor.membership().members]


async def added(supervisor: Supervisor, role: Role) -> Member:
    name = supervisor.add_worker(role)
    await until(lambda: name in ids(supervisor))
    return next(one for one in supervisor.membership().members if one.worker_id == name)


async def leaving(supervisor: Supervisor, spawner: FakeSpawner) -> FakeWorkerProcess:
    """A worker that was added, has something to do, and is to leave when that is done."""
    member = await added(supervisor, Role.DECODE)
    process = spawner.latest(member.worker_id)
    process.open_now = 3
    supervisor.remove_worker(member.worker_id, member.incarnation, limit_s=30.0)
    await until(lambda: any(one.is_leaving for one in supervisor.membership().members))
    return process


async def test_a_worker_that_is_added_is_kept_like_the_others() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        member = await added(supervisor, Role.DECODE)
        assert (member.worker_id, member.role) == ("decode-2", Role.DECODE)
        spawner.latest("decode-2").end("killed")
        await until(lambda: "decode-2" not in ids(supervisor))
        await until(is_ready(supervisor))
        assert supervisor.status().workers[-1].num_restarts == 1


async def test_a_worker_that_leaves_serves_what_it_has_and_then_gives_back_what_it_took() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        process = await leaving(supervisor, spawner)
        assert supervisor.status().workers[-1].state == UnitState.LEAVING
        assert supervisor._fleet.listed("decode-2") not in supervisor._fleet.members(), "the planner knows it is gone"
        await until(lambda: bool(spawner.gateways[0].evacuated))
        await asyncio.sleep(0.3)
        assert (process.num_stops, "decode-2" in ids(supervisor)) == (0, True)
        process.open_now, spawner.gateways[0].left = 0, 1
        await asyncio.sleep(0.5)
        assert process.num_stops == 0, "a gateway has placed something there that has not come yet"
        spawner.gateways[0].left = 0
        await until(lambda: spawner.released == ["decode-2"])
        assert (process.num_stops, "decode-2" in ids(supervisor)) == (1, False)
        await until(lambda: len(supervisor.status().workers) == 3)
        assert (await added(supervisor, Role.DECODE)).worker_id == "decode-2", "its name is free again"


async def test_what_a_leaving_worker_still_has_when_its_time_is_up_ends_with_it() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        member = await added(supervisor, Role.PREFILL)
        process = spawner.latest("prefill-1")
        process.open_now = 1
        supervisor.remove_worker("prefill-1", member.incarnation, limit_s=0.2)
        await until(lambda: spawner.released == ["prefill-1"])
        assert (process.open_now, process.num_stops, "prefill-1" in ids(supervisor)) == (1, 1, False)


async def test_a_worker_that_dies_while_it_leaves_does_not_come_back() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        (await leaving(supervisor, spawner)).end("killed")
        await until(lambda: spawner.released == ["decode-2"])
        await asyncio.sleep(0.6)  # longer than the first backoff
        assert len([one for one in spawner.workers if one.spec.worker_id == "decode-2"]) == 1
        assert len(supervisor.status().workers) == 3


async def test_one_that_has_not_come_yet_is_no_longer_waited_for() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        spawner.hangs = True
        name = supervisor.add_worker(Role.DECODE)
        await asyncio.sleep(0.05)
        assert supervisor._fleet.coming() == [name]
        assert supervisor._fleet.is_whole(), "nobody is missing for it"
        supervisor.remove_worker(name, "", limit_s=30.0)
        await until(lambda: spawner.released == [name])
        assert supervisor._fleet.coming() == []


async def test_an_order_for_an_earlier_life_removes_nobody() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        supervisor.remove_worker("decode-1", "another", limit_s=1.0)
        supervisor.remove_worker("decode-7", "another", limit_s=1.0)
        await asyncio.sleep(0.05)
        assert is_ready(supervisor)()
        assert len(ids(supervisor)) == 3


async def test_a_restarted_supervisor_finds_the_workers_that_were_added() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        member = await added(supervisor, Role.DECODE)
        async with running(AdoptingSpawner(spawner)) as second:
            await until(is_ready(second))
            await until(lambda: len(ids(second)) == 4)
            assert member in second.membership().members


async def test_a_restarted_supervisor_has_no_more_workers_come_than_may_be_there() -> None:
    """One of the first has left, and two were added."""
    spawner = FakeSpawner()
    scale = {"min_workers": 2, "max_workers": 4}
    async with running(spawner, scale=scale) as supervisor:
        await until(is_ready(supervisor))
        await added(supervisor, Role.DECODE)
        await added(supervisor, Role.PREFILL)
        gone = next(one for one in supervisor.membership().members if one.worker_id == "decode-1")
        supervisor.remove_worker("decode-1", gone.incarnation, limit_s=1.0)
        await until(lambda: spawner.released == ["decode-1"])
        wanted = ids(supervisor)
        async with running(AdoptingSpawner(spawner), scale=scale) as second:
            await until(is_ready(second))
            await until(lambda: len(ids(second)) >= 4)
            assert sorted(ids(second)) == sorted(wanted)


async def test_one_that_does_not_answer_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang() -> int:
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("cluster.supervisor.DRAIN_SLACK_S", 0.2)
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        member = await added(supervisor, Role.DECODE)
        monkeypatch.setattr(spawner.latest("decode-2"), "num_open", hang)
        supervisor.remove_worker("decode-2", member.incarnation, limit_s=0.3)
        await until(lambda: spawner.released == ["decode-2"])
        assert (spawner.latest("decode-2").num_stops, "decode-2" in ids(supervisor)) == (1, False)


async def test_a_cluster_that_ends_ends_who_is_just_leaving_too() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        await leaving(supervisor, spawner)
    assert spawner.latest("decode-2").num_stops == 1
    assert {unit.state for unit in supervisor.status().workers} <= {UnitState.STOPPED, UnitState.LEAVING}


async def test_the_controller_has_workers_come_when_no_split_is_enough() -> None:
    spawner = FakeSpawner()
    scale = {"max_workers": 5, "add_after_s": 0.1, "remove_after_s": 600.0}
    async with running(spawner, scale=scale) as supervisor:
        await until(is_ready(supervisor))
        spawner.gateways[0].told = lambda: long_prompts(supervisor, rate=9.0)
        await until(lambda: len(ids(supervisor)) == 5)
        await until(lambda: spawner.gateways[0].views[-1].num_added == 2)
        await asyncio.sleep(0.4)
        assert len(ids(supervisor)) == 5, "and no more than are allowed"


async def test_a_controller_that_fails_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        monkeypatch.setattr("cluster.control.controller.plan", _fails)
        await until(lambda: supervisor.controller is not None)
        first = supervisor.controller
        await until(lambda: supervisor.controller is not first)
        monkeypatch.undo()
        spawner.gateways[0].told = lambda: long_prompts(supervisor)
        await until(lambda: len(supervisor.membership().by_role(Role.PREFILL)) == 2)


def _fails(*_: object) -> None:
    raise RuntimeError("planted")


def test_the_backoff_doubles_and_is_bounded() -> None:
    waits = [backoff_s(failures) for failures in range(1, 100)]
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(waits) == MAX_BACKOFF_S


async def test_a_worker_that_keeps_dying_is_started_ever_more_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.supervisor.FIRST_BACKOFF_S", 0.05)
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        spawner.worker_fault = WorkerLost("killed at once")
        spawner.latest("decode-0").end("killed")
        began = asyncio.get_running_loop().time()
        await until(lambda: len(spawner.workers) >= 3 + 4)
        assert asyncio.get_running_loop().time() - began >= 0.05 + 0.1 + 0.2 + 0.4 - 0.01
        assert supervisor.status().phase == Phase.READY, "a cluster that was ready mends and does not give up"


@pytest.mark.parametrize("fault", [ModelError("layer 3 is missing"), ConfigError("router.port: 80 is in use")])
async def test_a_fault_that_will_not_mend_ends_a_start_at_once(fault: ModelError | ConfigError) -> None:
    spawner = FakeSpawner()
    spawner.worker_fault = fault if isinstance(fault, ModelError) else None
    spawner.gateway_fault = fault if isinstance(fault, ConfigError) else None
    async with running(spawner) as supervisor:
        await until(lambda: supervisor.status().phase == Phase.STOPPED)
        assert supervisor.status().failure == ErrorInfo(fault.code, fault.message)
        assert spawner.num_closes == 1


async def test_a_start_gives_up_after_a_few_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.supervisor.FIRST_BACKOFF_S", 0.01)
    spawner = FakeSpawner()
    spawner.worker_fault = WorkerLost("its process ended")
    async with running(spawner) as supervisor:
        await until(lambda: supervisor.status().phase == Phase.STOPPED)
        failure = supervisor.status().failure
        assert failure is not None
        assert "its process ended" in failure.message
        assert len(spawner.workers) <= 3 * MAX_FIRST_ATTEMPTS


async def test_a_cluster_that_is_not_ready_in_time_is_taken_down_and_says_what_is_missing() -> None:
    spawner = FakeSpawner()
    spawner.hangs = True
    async with running(spawner, start_timeout_s=0.2) as supervisor:
        await until(lambda: supervisor.status().phase == Phase.STOPPED)
        failure = supervisor.status().failure
        assert failure is not None
        assert failure.code == "deadline_exceeded"
        assert "prefill-0 is" in failure.message


async def test_a_job_ends_when_its_driver_is_no_longer_heard() -> None:
    spawner = FakeSpawner()
    async with running(spawner, driver_lease_s=0.3) as supervisor:
        for _ in range(6):  # a heartbeat every 0.1 s carries it over two leases
            await supervisor.follow(after=10**9, timeout_s=0.1)
        assert supervisor.status().phase == Phase.READY
        await until(lambda: supervisor.status().phase == Phase.STOPPED, limit_s=2.0)
        assert {worker.num_stops for worker in spawner.workers} == {1}
        assert spawner.gateways[0].num_stops == 1
        assert supervisor.membership().members == ()


async def test_a_detached_cluster_needs_no_driver() -> None:
    async with running(FakeSpawner(), driver_lease_s=0.1, lifetime="detached") as supervisor:
        await until(is_ready(supervisor))
        await asyncio.sleep(0.3)
        assert supervisor.status().phase == Phase.READY
        assert not supervisor.is_abandoned()


async def test_follow_returns_with_the_next_change_and_never_later_than_asked() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        seen = supervisor.status()
        same = await supervisor.follow(seen.sequence, timeout_s=0.05)
        assert same == seen
        waiting = asyncio.create_task(supervisor.follow(seen.sequence, timeout_s=5.0))
        await asyncio.sleep(0)
        spawner.latest("prefill-0").end("killed")
        changed = await waiting
        assert changed.sequence > seen.sequence


async def test_stopping_twice_stops_once() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        await asyncio.gather(supervisor.stop(), supervisor.stop())
        await supervisor.stop()
        assert spawner.num_closes == 1
        assert supervisor.status().phase == Phase.STOPPED
        assert {unit.state for unit in supervisor.status().workers} == {UnitState.STOPPED}


async def test_the_gateway_drains_while_its_workers_still_serve() -> None:
    spawner = FakeSpawner()
    async with running(spawner) as supervisor:
        await until(is_ready(supervisor))
        seen = list[tuple[float, int, int]]()

        def look(polite_s: float) -> None:
            members = spawner.gateways[0].applied[-1].members
            seen.append((polite_s, len(members), sum(worker.num_stops for worker in spawner.workers)))

        spawner.gateways[0].on_stop = look
        await supervisor.stop()
        assert seen == [(end_limits(RouterConfig()).gateway_s, 3, 0)]
        assert supervisor.membership().members == ()


def test_every_limit_holds_those_inside_it() -> None:
    for drain_s in (0.0, 10.0, 600.0):
        limits = end_limits(RouterConfig(drain_s=drain_s))
        assert drain_s < limits.gateway_s < limits.gateway_step_s
        assert limits.total_s > limits.gateway_step_s + limits.worker_step_s


async def test_stopping_is_bounded_though_a_process_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(polite_s: float) -> None:
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("cluster.end_limits.KILL_S", 0.05)
    spawner = FakeSpawner()
    async with running(spawner, limits=EndLimits(gateway_s=0.05, worker_s=0.05)) as supervisor:
        await until(is_ready(supervisor))
        monkeypatch.setattr(spawner.latest("decode-0"), "stop", hang)
        monkeypatch.setattr(spawner.gateways[0], "stop", hang)
        async with asyncio.timeout(1.0):
            await supervisor.stop()
        assert spawner.num_closes == 1, "what hangs is cleared away by name"


# --- several gateways -----------------------------------------------------------------------------------------


async def test_several_gateways_share_the_port_that_the_first_one_found() -> None:
    spawner = FakeSpawner()
    async with running(spawner, gateways=3) as supervisor:
        await until(is_ready(supervisor))
        assert [gateway.asked_port for gateway in spawner.gateways] == [0, 4321, 4321]
        assert [unit.name for unit in supervisor.status().gateways] == ["gateway-0", "gateway-1", "gateway-2"]
        for gateway in spawner.gateways:
            await until(lambda gateway=gateway: gateway.applied[-1] == supervisor.membership())
        assert supervisor.membership().num_gateways == 3


async def test_a_gateway_that_dies_is_replaced_while_the_others_take_its_share() -> None:
    spawner = FakeSpawner()
    async with running(spawner, gateways=2) as supervisor:
        await until(is_ready(supervisor))
        before = supervisor.membership()
        spawner.gateways[0].end("killed")
        await until(lambda: supervisor.membership().num_gateways == 1)
        assert supervisor.membership().members == before.members
        await until(lambda: spawner.gateways[1].applied[-1].num_gateways == 1)
        await until(lambda: supervisor.membership().num_gateways == 2)
        assert [gateway.asked_port for gateway in spawner.gateways] == [0, 4321, 4321]
        await until(lambda: [one.num_gateways for each in spawner.gateways[1:] for one in each.applied[-1:]] == [2, 2])


async def test_all_gateways_are_stopped() -> None:
    spawner = FakeSpawner()
    async with running(spawner, gateways=2) as supervisor:
        await until(is_ready(supervisor))
    assert [gateway.num_stops for gateway in spawner.gateways] == [1, 1]


# --- one life of a part, inside its actor ---------------------------------------------------------------------


class FakePart:
    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.num_starts = 0
        self.failing: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> str:
        self.num_starts += 1
        await asyncio.sleep(0)
        if self.fault is not None:
            raise self.fault
        return "started"

    async def failed(self) -> str:
        return await self.failing

    async def stop(self) -> None: ...


async def test_a_part_starts_once_however_often_it_is_asked() -> None:
    part = FakePart()
    life = Incarnation(part, end_process=lambda code: None)
    assert await asyncio.gather(life.start(), life.start()) == ["started", "started"]
    assert part.num_starts == 1
    await life.stop()


async def test_a_fault_at_the_start_crosses_as_a_record() -> None:
    assert await Incarnation(FakePart(ModelError("no file"))).start() == ErrorInfo("model_error", "no file")


async def test_the_process_ends_after_its_part_failed_and_the_reason_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.incarnation.LAST_WORDS_S", 0.01)
    part, codes = FakePart(), list[int]()
    life = Incarnation(part, end_process=codes.append)
    await life.start()
    part.failing.set_result("the engine's process died")
    assert await life.failed() == "the engine's process died"
    await until(lambda: codes == [1])
