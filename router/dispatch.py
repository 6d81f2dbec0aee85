"""The owner of live requests: places them, merges their tokens in order, and places them anew when a worker fails.

A request's way:
1. `generate` admits it (or refuses at once) and gives it a deadline;
2. the placer names a prefill and a decode worker, lets it wait for them, or refuses it (router/placer.py); the prefill
   worker gets the Submission;
3. tokens come over the workers' streams, the first from prefill, the others from decode, merged by LiveRequest;
4. a failed placement raises the epoch: the prompt and the tokens so far are placed elsewhere, and the stream goes on
   at the next index. A refusal for lack of room waits a little and tries again: until the deadline, or, if it has
   targets and no token yet, once;
5. when the caller is done with the iterator, whatever still runs for it is aborted.

Several answers to one prompt come as one stream. Each is a LiveRequest with a task of its own; their first placement is
one submission.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from engine.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SteelyardError,
    TransferFailed,
    Unavailable,
    WorkerLost,
)
from engine.streams import StreamBatch
from engine.types import Endpoint, Key, Request, Role, Submission, TokenOutput
from router.api import ControlView, HealthView, WorkerView
from router.block_names import UNNAMED, Naming
from router.canary import Canary
from router.config import RouterConfig
from router.evacuation import Evacuation
from router.fan_in import fan_in
from router.learnt import Learnt
from router.live import LiveRequest
from router.membership import Member, Membership
from router.moves import Moves
from router.placer import Placer
from router.policies.snapshot import DEFAULT_LIMITS, EngineLimits, Name, Placement, Predictor, WorkerLoad, has_targets
from router.rebalance import Rebalancer
from router.report import GatewayReport, gateway_report
from router.step_history import StepHistory
from router.workers import Connector, WorkerLink

REFUSED_PAUSE_S = 0.05  # doubled at each refusal, up to
LONGEST_PAUSE_S = 1.0
SHORT_TOKENS = 8  # one that generates no more is not worth a move
MOST_REFUSALS = 1  # of workers, for a request with targets; then its client hears of it

log = logging.getLogger(__name__)


class Names(Protocol):
    """Where ids and seeds come from; the simulator's are a function of its seed."""

    def new_request_id(self) -> str: ...

    def new_seed(self) -> int: ...


class Dispatcher:
    """Implements router.api.Generator."""

    def __init__(
        self, config: RouterConfig, gateway_id: str, connector: Connector, names: Names,
        on_retry: Callable[[Key, SteelyardError], None] = lambda _key, _error: None, naming: Naming = UNNAMED,
        limits: EngineLimits = DEFAULT_LIMITS, predictor: Predictor | None = None,
    ) -> None:  # fmt: skip
        """`on_retry` hears which placement is given up for another one, and why. `naming`: of the workers' blocks.
        `predictor`: by which it decides, if not by what it learns."""
        self._config = config
        self._on_retry = on_retry
        self._gateway_id = gateway_id
        self._connector = connector
        self._names = names
        self._membership = Membership()
        self._links: dict[tuple[str, str], WorkerLink] = {}  # by worker id and incarnation
        self._live: dict[str, LiveRequest] = {}
        self._background: list[asyncio.Task[None]] = []
        self._num_retries: Counter[str] = Counter()  # by the code of what ended the placement before
        self._strays: dict[tuple[str, Key], None] = {}  # placements being aborted because their tokens still come
        self._closed = asyncio.Event()
        self._news = asyncio.Event()  # a worker has reported, or the membership has changed
        self._control: ControlView | None = None
        self.canary = Canary(self, config.canary_s)
        self.moves = Moves(self._live, self._links)
        self.rebalancer = Rebalancer(self.moves, self.loads, config.migrate_below, config.back_up_below)
        self.learnt = Learnt(naming)
        self.placer = Placer(config, self._links, self.learnt, predictor or self.learnt.predictor, limits, self._now)
        self.step_history = StepHistory()

    def new_request_id(self) -> str:
        return self._names.new_request_id()

    def new_seed(self) -> int:
        return self._names.new_seed()

    # --- membership ----------------------------------------------------------------------------------------

    def apply(self, membership: Membership) -> None:
        """Take a newer membership: connect to who is new, let go of who has left."""
        if self._closed.is_set() or membership.version <= self._membership.version:
            return
        self._membership = membership
        for fault in membership.unpaired():
            log.warning("%s", fault)
        wanted = {(member.worker_id, member.incarnation): member for member in membership.members}
        for name in [name for name in self._links if name not in wanted]:
            link = self._links.pop(name)
            self._in_background(link.close())
            self.step_history.forget(*name)
            self.learnt.left(link.member)
        for name, member in wanted.items():
            if name in self._links:
                self._links[name].member = member
            else:
                client = self._connector.connect(member)
                self._links[name] = WorkerLink(member, client, self._gateway_id, self._on_batch, self._on_down)
        self.placer.members_changed()

    async def close(self) -> None:
        """Let go of all workers; live requests end with an error, here and on the workers."""
        self._closed.set()
        self._news.set()
        await self.canary.stop()
        await self.rebalancer.stop()
        for live in self._live.values():
            live.fail(Unavailable("the gateway is shutting down"))
            self._abandon(live)
        await asyncio.gather(*self._background, return_exceptions=True)
        closing = [link.close() for link in self._links.values()]
        self._links.clear()
        self.placer.members_changed()
        await asyncio.gather(*closing, return_exceptions=True)

    # --- requests ------------------------------------------------------------------------------------------

    async def generate(self, request: Request, *siblings: Request) -> AsyncGenerator[TokenOutput]:
        """See router.api.Generator."""
        lives = self._admit((request, *siblings))
        loop = asyncio.get_running_loop()
        timers = [loop.call_at(live.deadline, live.expire) for live in lives]  # one each, not one for each wait
        try:
            follows = [self._follow(live) for live in lives]
            async with aclosing(fan_in(follows) if siblings else follows[0]) as outputs:
                async for output in outputs:
                    yield output
        finally:
            for timer in timers:
                timer.cancel()
            for live in lives:
                del self._live[live.request.request_id]
                self._abandon(live)
                self.placer.ended(live)

    def cancel(self, request_id: str) -> None:
        """See router.api.Generator."""
        live = self._live.get(request_id)
        if live is not None:
            self._abandon(live)
            live.cancel()

    def tap(self, request_id: str, take: Callable[[TokenOutput], bool]) -> None:
        """See router.api.Generator."""
        live = self._live.get(request_id)
        if live is not None:
            live.tap = take

    async def _follow(self, live: LiveRequest) -> AsyncGenerator[TokenOutput]:
        """The outputs of one, to its end."""
        finish = None
        while finish is None:
            event = await self._next_event(live)
            if isinstance(event, TokenOutput):
                finish = event.finish
                live.placement = None if finish else live.placement  # nothing runs any more
                yield event

    def _admit(self, requests: tuple[Request, ...]) -> list[LiveRequest]:
        """All of them or, with an error, none; the others follow the first."""
        most = self._config.max_live_requests
        if self._closed.is_set():
            raise Unavailable("the gateway is shutting down")
        if len(requests) > most:
            raise InvalidRequest(f"'n': {len(requests)} answers are more than the {most} served at a time", param="n")
        if len(self._live) + len(requests) > most:
            raise Overloaded(f"{len(self._live)} requests are being served", retry_after_s=1)
        for request in requests:
            if request.request_id in self._live:
                raise InvalidRequest(f"request id {request.request_id} is in use", param="request_id")
        now, first = self._now(), requests[0]
        deadline, first_due = now + min(first.timeout_s, self._config.deadline_s), now + first.service.ttft_s
        lives = [LiveRequest(request, deadline, first_due, self.placer.changed) for request in requests]
        for live in lives[1:]:
            live.follow(lives[0])
        self._live |= {live.request.request_id: live for live in lives}
        return lives

    async def _next_event(self, live: LiveRequest) -> TokenOutput | None:
        """The next output; None when a placement failed and a new one has been made. Raises what ends the request."""
        if live.placement is None and live.leader is None:
            async with self._in_time(live):
                await self._place(live)
        event = await live.next_event()  # the end of its time is one, too
        if isinstance(event, TokenOutput):
            return event
        async with self._in_time(live):
            await self._place_again(live, event)
        return None

    @asynccontextmanager
    async def _in_time(self, live: LiveRequest) -> AsyncGenerator[None]:
        """Raises DeadlineExceeded if its deadline passes before the end, or has passed. Breaks off what is done when it
        is cancelled."""
        try:
            async with asyncio.timeout_at(live.deadline) as live.patience:
                if live.has_expired:
                    raise TimeoutError
                yield
            if live.has_expired:
                raise TimeoutError
        except TimeoutError:
            if live.is_cancelled:
                return
            raise DeadlineExceeded(f"the deadline passed after {len(live.tokens)} tokens") from None
        finally:
            live.patience = None

    async def _place(self, live: LiveRequest) -> None:
        """Choose workers and submit; a failure to submit becomes the placement's first event."""
        begun = self._now()
        placement = await self.placer.choose(live)
        if live.is_cancelled:
            return
        live.leave()
        self.placer.placed(live, placement)
        for one in live.placed_together:
            one.place(placement)
        decode = None if placement.decode is None else placement.decode.endpoint
        request, *siblings = (one.placed_request(self._now()) for one in live.placed_together)
        source = self._source_of(live, placement)
        submission = Submission(request, self._gateway_id, decode, tuple(siblings), source)
        link = self._links[(placement.first.worker_id, placement.first.incarnation)]
        try:
            await link.client.submit(submission, link.member.role_epoch, self._config.rpc_timeout_s)
        except SteelyardError as error:
            live.refused_at_once = True
            live.fail(error)
        live.last_heard = max(live.last_heard, placed_at := self._now())
        live.note("route", placed_at - begun)

    def _source_of(self, live: LiveRequest, placement: Placement) -> Endpoint | None:
        """Another worker that has more of the beginning of the prompt, from an earlier turn or request."""
        name = self.learnt.source(live, (placement.first.worker_id, placement.first.incarnation))
        link = self._links.get(name) if name is not None else None
        if link is None or not link.connected:
            return None
        return link.member.endpoint if link.member.cohort == placement.first.cohort else None

    async def _place_again(self, live: LiveRequest, error: SteelyardError) -> None:
        """Raises `error` if it is the request's own fault or was met too often."""
        if isinstance(error, DeadlineExceeded):  # a call's, or by a worker's clock; our own is told where it passes
            error = Unavailable(error.message)
        if isinstance(error, InvalidRequest) or self._closed.is_set():
            raise error
        live.num_refusals, live.num_failures = _count(error, live.num_refusals, live.num_failures)
        if live.num_failures >= self._config.max_attempts:
            raise error
        log.info("request %s is placed again after: %s", live.request.request_id, error.message)
        self._num_retries[error.code] += 1
        self._on_retry(live.key, error)
        self._note_refusal(live, error)
        for one in live.placed_together:
            self._abandon(one)
            one.void()
        live.shuns_wire = isinstance(error, TransferFailed)  # what cannot be moved is computed where it is needed
        pauses = max(live.num_refusals, live.num_failures)
        await self._pause(min(REFUSED_PAUSE_S * 2**pauses, LONGEST_PAUSE_S))
        if not await self.reachable():  # a worker is being replaced; the deadline bounds this
            raise error
        live.note("recovery", self._now() - live.last_heard)
        await self._place(live)

    async def reachable(self) -> bool:
        """Returns once a worker can be reached; False if the gateway is closed. The caller bounds the wait."""
        while not any(link.connected for link in self._links.values()) and not self._closed.is_set():
            self._news.clear()
            await self._news.wait()
        return not self._closed.is_set()

    def _note_refusal(self, live: LiveRequest, error: SteelyardError) -> None:
        """Where its prefix is now, and who has no room. Raises Overloaded if workers have had the last word."""
        live.refused_by = live.refused_after = None
        if not isinstance(error, Overloaded) or live.placement is None:
            return
        if live.num_refusals > MOST_REFUSALS and has_targets(live.request.service) and not live.tokens:
            raise self.placer.refused_by_workers(live)
        first, decode = live.placement.first, live.placement.decode
        if decode is not None and not live.refused_at_once:
            live.refused_after = (first.worker_id, first.incarnation)
            live.refused_by = (decode.worker_id, decode.incarnation)

    async def _pause(self, pause_s: float) -> None:
        """Wait; raises Unavailable when the gateway is closed meanwhile."""
        try:
            async with asyncio.timeout(pause_s):
                await self._closed.wait()
        except TimeoutError:
            return
        raise Unavailable("the gateway is shutting down")

    def _abandon(self, live: LiveRequest) -> None:
        """Abort a placement on its workers, without waiting."""
        for member, key in live.ends:
            link = self._links.get((member.worker_id, member.incarnation))
            if link is not None:
                self._in_background(self._abort(link, key))

    async def _abort(self, link: WorkerLink, key: Key) -> None:
        try:
            await link.client.abort(key, self._config.rpc_timeout_s)
        except SteelyardError as error:
            log.warning("abort of %s on %s failed: %s", key, link.member.worker_id, error.message)

    # --- what workers say ----------------------------------------------------------------------------------

    def _on_batch(self, member: Member, batch: StreamBatch) -> None:
        self._news.set()
        self.placer.heard(member.name)
        if not batch.outputs:
            self.placer.call_waiting()
        if (member.worker_id, member.incarnation) in self._links:  # what has left is forgotten
            self.step_history.add(member, batch.steps)
            self.learnt.hear(member, batch)
        now, has_decoded = self._now(), False
        is_together = self._control is not None and self._control.is_together and member.role is Role.DECODE
        for output in batch.outputs:
            live = self._live.get(output.key.request_id)
            if live is None or live.is_stray(output):
                self._abort_stray(member, output)
            elif live.take(output if live.migration is None else self.moves.with_pause(live, output), member.worker_id):
                live.last_heard = now
                has_decoded = has_decoded or live.handed_off or is_together
                if live.handed_off and output.transfer is not None:
                    self.learnt.hear_transfer(live, output)
        if has_decoded:
            self.canary.prove()

    def _abort_stray(self, member: Member, output: TokenOutput) -> None:
        """Tokens that nobody wants: an abort came before what it was to end, or was lost. Once at a time."""
        link = self._links.get((member.worker_id, member.incarnation))
        if output.finish or link is None or (member.worker_id, output.key) in self._strays:
            return
        self._strays[(member.worker_id, output.key)] = None
        self._in_background(self._end_stray(link, output.key))

    async def _end_stray(self, link: WorkerLink, key: Key) -> None:
        await self._abort(link, key)
        del self._strays[(link.member.worker_id, key)]

    def _on_down(self, member: Member, reason: str) -> None:
        self.learnt.lost(member)
        self.placer.heard(member.name)
        for live in self._live.values():
            if (member.worker_id, member.incarnation) in live.workers:
                live.fail(WorkerLost(f"worker {member.worker_id} was lost: {reason}"))

    # --- views ---------------------------------------------------------------------------------------------

    def loads(self) -> Sequence[WorkerLoad]:
        """Every linked worker's load."""
        return self.placer.loads()

    def report(self, control: ControlView) -> GatewayReport:
        """To the controller, which says how it is: what has come since the last one, and how the workers stand."""
        self._control = control
        arrived, fared = self.placer.arrivals.take()
        return gateway_report(self._gateway_id, self._now(), arrived, fared, self.loads(), self.placer.times)

    async def evacuate(self, worker: Name, limit_s: float) -> int:
        """Move what generates on a worker elsewhere; how many are still placed there after about this time, for either
        phase."""
        evacuation = Evacuation(self.moves, self.loads, worker, self._is_short)
        try:
            left = await evacuation.run(limit_s)
            return max(left, sum(worker in live.workers for live in self._live.values()))
        finally:
            for task in evacuation.tasks:
                self._in_background(_ended(task))

    def _is_short(self, request_id: str) -> bool:
        live = self._live.get(request_id)
        return live is None or self.placer.expected_left(live) <= SHORT_TOKENS

    def health(self) -> HealthView:
        healthy, reason, age_s = self.canary.verdict()
        workers = tuple(_view(link) for link in self._links.values())
        return HealthView(
            healthy, reason, age_s, self._membership.version, workers, len(self._live), self.retries, self.moves.counts,
            self.learnt.predictor.view(), self.placer.counts, self.placer.num_waiting, self._gateway_id, self._control,
        )  # fmt: skip

    @property
    def retries(self) -> tuple[tuple[str, int], ...]:
        """See router.api.HealthView."""
        return tuple(sorted(self._num_retries.items()))

    def _in_background(self, work: Coroutine[None, None, None]) -> None:
        self._background = [task for task in self._background if not task.done()]
        self._background.append(asyncio.get_running_loop().create_task(work))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _count(error: SteelyardError, num_refusals: int, num_failures: int) -> tuple[int, int]:
    """A refusal for lack of room is no failure of the placement."""
    return (num_refusals + 1, num_failures) if isinstance(error, Overloaded) else (num_refusals, num_failures + 1)


async def _ended(task: asyncio.Future[None]) -> None:
    """Returns when it is over, whatever came of it."""
    await asyncio.wait([task])


def _view(link: WorkerLink) -> WorkerView:
    member, stats = link.member, link.stats
    return WorkerView(
        member.worker_id, member.incarnation, member.role, member.address, link.connected, stats.num_running,
        stats.num_waiting, stats.num_blocks, stats.num_free_blocks, stats.num_leaked_blocks, stats.prefix_queries,
        stats.prefix_hits, stats.host_blocks, stats.host_queries, stats.host_hits, member.kv_token_bytes,
        link.transfers,
    )  # fmt: skip
