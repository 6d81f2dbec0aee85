"""Workers as the router sees them, moved by the test: they note what they are told, and say what they are made to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import ClassVar

from engine.errors import SteelyardError, WorkerLost
from engine.streams import StreamBatch
from engine.types import EngineStats, FinishReason, Key, Move, Request, Role, SamplingParams, Submission, TokenOutput
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.membership import Member, Membership
from tests.virtual import settle

COHORT = "c"
KEEPALIVE_S = 1.0


def member(name: str, incarnation: str = "i1", cohort: str = COHORT, role_epoch: int = 0) -> Member:
    """p... is a prefill worker, d... a decode worker."""
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return Member(name, incarnation, role, role_epoch, f"{name}-{incarnation}:1", cohort)


def request(name: str = "r", max_tokens: int = 8, timeout_s: float = 600.0, num_prompt: int = 5) -> Request:
    return Request(name, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens), timeout_s=timeout_s)


@dataclass(eq=False)
class FakeWorker:
    """One life of one worker. Implements WorkerClient."""

    stats_stand: ClassVar[bool] = True

    member: Member
    submissions: list[Submission] = field(default_factory=list)
    role_epochs: list[int] = field(default_factory=list)
    aborted: list[Key] = field(default_factory=list)
    refusals: list[SteelyardError] = field(default_factory=list)  # raised by the next submits
    moves: list[Move] = field(default_factory=list)
    move_error: SteelyardError | None = None
    num_streams: int = 0  # opened so far
    reachable: bool = True
    mute: bool = False  # its stream stays open and says nothing
    closed: bool = False
    stats: EngineStats = field(default_factory=lambda: EngineStats(num_blocks=10, num_free_blocks=10))
    _says: asyncio.Queue[tuple[TokenOutput, ...] | Exception] = field(default_factory=asyncio.Queue)

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None:
        await asyncio.sleep(0)
        if not self.reachable:
            raise WorkerLost("not reachable")
        self.submissions.append(submission)
        self.role_epochs.append(role_epoch)
        if self.refusals:
            raise self.refusals.pop(0)

    async def move(self, move: Move, timeout_s: float) -> None:
        """It says that it is done at once."""
        await asyncio.sleep(0)
        if not self.reachable:
            raise WorkerLost("not reachable")
        self.moves.append(move)
        if self.move_error is not None:
            raise self.move_error

    async def abort(self, key: Key, timeout_s: float) -> None:
        await asyncio.sleep(0)
        if not self.reachable:
            raise WorkerLost("not reachable")
        self.aborted.append(key)

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        self.num_streams += 1
        self._says = asyncio.Queue()
        if not self.reachable:
            raise WorkerLost("not reachable")
        yield StreamBatch((), self.stats)
        while True:
            try:
                async with asyncio.timeout(None if self.mute else KEEPALIVE_S):
                    said = await self._says.get()
            except TimeoutError:
                said = ()
            if isinstance(said, Exception):
                raise said
            yield StreamBatch(said, self.stats)

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        return told

    async def close(self) -> None:
        self.closed = True

    # --- what the test makes it do -------------------------------------------------------------------------

    def say(self, *outputs: TokenOutput) -> None:
        self._says.put_nowait(outputs)

    def break_stream(self, error: Exception | None = None) -> None:
        self._says.put_nowait(error or WorkerLost("the stream broke"))

    def die(self) -> None:
        self.reachable = False
        self.break_stream()

    @property
    def key(self) -> Key:
        """Of the newest submission."""
        return self.submissions[-1].request.key


def token(key: Key, index: int, *ids: int, finish: FinishReason | None = None, cached: int = 0) -> TokenOutput:
    return TokenOutput(key, index, ids or (index,), finish, cached_tokens=cached)


class Cluster:
    """A dispatcher over fake workers. Implements Connector and Names."""

    def __init__(self, *names: str, **settings: float) -> None:
        self.lives: dict[tuple[str, str], FakeWorker] = {}
        config = RouterConfig.model_validate({"canary_s": 1e6, **settings})
        self.dispatcher = Dispatcher(config, "g0", self, self)
        self.version = 0
        self.list(*(member(name) for name in names))
        self._num_ids = 0

    def connect(self, member: Member) -> FakeWorker:
        worker = self.lives[(member.worker_id, member.incarnation)] = FakeWorker(member)
        return worker

    def new_request_id(self) -> str:
        self._num_ids += 1
        return f"id{self._num_ids}"

    def new_seed(self) -> int:
        return 7

    def list(self, *members: Member) -> None:
        self.version += 1
        self.dispatcher.apply(Membership(self.version, members))

    def __getitem__(self, name: str) -> FakeWorker:
        """The newest life of a worker."""
        return next(worker for (worker_id, _), worker in reversed(self.lives.items()) if worker_id == name)

    def generate(self, asked: Request | None = None) -> Client:
        return Client(self, asked or request())


class Client:
    """Consumes one request: `ids` so far, and the error that ended it."""

    def __init__(self, cluster: Cluster, asked: Request) -> None:
        self.outputs: list[TokenOutput] = []
        self.error: SteelyardError | None = None
        self._cluster = cluster
        self._asked = asked
        self.task = asyncio.ensure_future(self._run())

    @property
    def ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def is_done(self) -> bool:
        return self.task.done()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await settle()

    async def _run(self) -> None:
        try:
            async with aclosing(self._cluster.dispatcher.generate(self._asked)) as outputs:
                async for output in outputs:
                    assert output.first_index == len(self.ids), "indices are contiguous"
                    self.outputs.append(output)
        except SteelyardError as error:
            self.error = error


async def ready(*names: str, **settings: float) -> Cluster:
    """A cluster whose links are up."""
    cluster = Cluster(*names, **settings)
    await settle()
    return cluster


def keys(submissions: Iterable[Submission]) -> list[Key]:
    return [submission.request.key for submission in submissions]
