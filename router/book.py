"""The book: what every worker has of our live requests, and what these will take of it as predicted.

1. `placed` predicts a placement when it is made;
2. `note` hears of each request that is placed, gives its first token, is handed off, moves, or ends, and files it
   under the workers that it is on;
3. `load` derives a worker's load from what is filed there, when that has changed since it was last asked, or when a
   request there has outlived its prediction; `loads` keeps those of all workers from one decision to the next, and
   makes anew those that may be others. So a decision costs as much as has changed, and a look at each worker.

Nothing is counted up and down: what is filed are the live requests themselves.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from engine.types import EngineStats
from router.live import LiveRequest
from router.membership import Member, Pool
from router.policies.occupancy import NO_DECODES, NO_PROMPTS, Decode, Decodes, Prompts, decodes_of, prompts_of, turn_of
from router.policies.rehearsal import Prompt, progressed
from router.policies.snapshot import EngineLimits, Name, Placement, Predictor, WorkerLoad

LEAST_LEFT = 0.05  # of what it has generated: one that has outlived its prediction is expected to go on for so long
LEARNING_RATE = 0.02


@dataclass(slots=True, eq=False)
class _Page:
    """Of one worker: who is on it, whose prompts it has, and what follows from that until it changes."""

    lives: dict[str, LiveRequest] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    since: float = 0.0  # when it began with the first of its prompts
    finished: set[str] = field(default_factory=set)  # of its prompts, with the step that ended at `ended`
    ended: float = 0.0
    is_current: bool = False
    num_prompt_tokens: int = 0
    queue: Prompts = NO_PROMPTS
    decodes: Decodes = NO_DECODES


@dataclass(frozen=True, slots=True)
class _Forecast:
    """Of one placement, when it was made: `num_done` tokens had been generated. `began`: when its first token came."""

    placed: float
    ttft_s: float
    prompt: Prompt
    num_done: int
    began: float = 0.0


class Foretold(NamedTuple):
    """A first token: when its request was placed, and when it was to come."""

    placed: float
    at: float


class Link(Protocol):
    """A worker as it is known now: router.workers.WorkerLink."""

    @property
    def member(self) -> Member: ...

    @property
    def connected(self) -> bool: ...

    @property
    def stats(self) -> EngineStats: ...


class Book:
    def __init__(self, predictor: Predictor, limits: EngineLimits) -> None:
        self._predictor = predictor
        self._limits = limits
        self._pages: dict[Name, _Page] = {}
        self._where: dict[str, tuple[Name, ...]] = {}
        self._forecasts: dict[str, _Forecast] = {}
        self._loads: dict[Name, WorkerLoad] = {}  # as asked for last, of workers on which nothing is filed otherwise
        self._used_share = 1.0  # of the tokens that requests ask for at most, what they use on average

    def expected_output(self, live: LiveRequest) -> float:
        """Tokens still to come."""
        return _left(live.request.sampling.max_tokens * self._used_share, len(live.tokens))

    def foretold(self, live: LiveRequest) -> Foretold | None:
        """Of a request whose first token has just come: when it was expected, with all that was placed after it."""
        name = live.request.request_id
        for worker in self._where.get(name, ()):
            page = self._pages[worker]
            prompt = page.prompts.get(name)
            if prompt is not None:
                queue = self._queue(page)
                return Foretold(prompt.placed, queue.ends[queue.all.index(prompt)])
        return None

    # --- what happens ----------------------------------------------------------------------------------------

    def placed(self, live: LiveRequest, placement: Placement, num_cached: int, now: float) -> None:
        """It is about to get this placement. `num_cached` positions of its beginning are where it is computed."""
        first = placement.first
        page = self._pages.get((first.worker_id, first.incarnation), _Page())
        num_new = max(1, live.request.num_tokens + len(live.tokens) - num_cached)
        compute_s = self._predictor.prefill_s(first.pool, num_new, num_cached, self._limits.prefill_chunk)
        prompt = Prompt(live.first_due, now, num_new, compute_s, num_new)
        ttft_s = placement.ttft_s
        if ttft_s is None:
            self._end_step(page)
            ttft_s = self._queue(page).around_s(live.first_due, now)[0] + compute_s
        for one in live.placed_together:
            self._forecasts[one.request.request_id] = _Forecast(now, ttft_s, prompt, len(one.tokens))

    def note(self, live: LiveRequest, now: float) -> None:
        """Where it is may have changed, or in which phase."""
        name = live.request.request_id
        has_token = live.placement is not None and not live.is_prefilling
        self._take_off(name, now, has_token)
        forecast = self._forecasts.get(name)
        if forecast is None:
            return  # it has ended: a move of it may still be over later
        workers = live.workers
        for worker in workers:
            self._page(worker).lives[name] = live
            self._touch(worker)
        if workers:
            self._where[name] = workers
        if live.first_worker is not None and live.is_prefilling and live.leader is None:
            page = self._page(live.first_worker)
            self._end_step(page)
            page.since = page.since if page.prompts else now
            page.prompts[name] = forecast.prompt
        elif has_token and not forecast.began:
            self._forecasts[name] = replace(forecast, began=now)

    def ended(self, live: LiveRequest, now: float) -> None:
        """Nothing of it is left."""
        name = live.request.request_id
        self._take_off(name, now, has_token=False)
        self._forecasts.pop(name, None)
        if live.is_finished:
            share = len(live.tokens) / max(1, live.request.sampling.max_tokens)
            self._used_share += LEARNING_RATE * (min(1.0, share) - self._used_share)

    def _take_off(self, name: str, now: float, has_token: bool) -> None:
        for worker in self._where.pop(name, ()):
            page = self._pages[worker]
            self._touch(worker)
            del page.lives[name]
            if name in page.prompts and has_token:
                page.finished.add(name)
                page.ended = now
            else:
                page.prompts.pop(name, None)
                page.finished.discard(name)
            if not page.lives:
                del self._pages[worker]

    def _touch(self, worker: Name) -> None:
        self._pages[worker].is_current = False
        self._loads.pop(worker, None)

    def _end_step(self, page: _Page) -> None:
        """First tokens tell of a step's end. What of its time was not theirs was for others: work is neither lost nor
        made, so that an error of one prediction is not one of all that come after it."""
        if not page.finished:
            return
        done = [page.prompts.pop(name) for name in page.finished]
        page.finished.clear()
        work_s = page.ended - page.since - sum(one.left_s for one in done)
        ordered = sorted(page.prompts, key=lambda name: turn_of(page.prompts[name]))
        after = progressed([page.prompts[name] for name in ordered], work_s, self._limits.prefill_chunk)
        page.prompts = dict(zip(ordered, after, strict=True))
        page.since = page.ended

    # --- what follows ----------------------------------------------------------------------------------------

    def loads(self, links: Collection[Link], now: float) -> list[WorkerLoad]:
        """Of all links. A load stands as long as its worker's page, report and link are those that it was made of."""
        kept = self._loads
        loads = [
            load
            if (load := kept.get((member := link.member).name)) is not None
            and load.member is member
            and load.stats is link.stats
            and load.connected is link.connected
            and not (load.decodes.ends and load.decodes.ends[0] < now)
            else self._make(link, now)
            for link in links
        ]
        if len(kept) > len(links):  # of those that have left
            self._loads = {load.name: load for load in loads}
        return loads

    def _make(self, link: Link, now: float) -> WorkerLoad:
        load = self._loads[link.member.name] = self.load(link, now)
        return load

    def load(self, link: Link, now: float) -> WorkerLoad:
        member, stats = link.member, link.stats
        page = self._pages.get(member.name)
        if page is None:
            return WorkerLoad(member, link.connected, 0, 0, stats)
        if not page.is_current or (page.decodes.ends and page.decodes.ends[0] < now):
            self._derive(page, member.name, member.pool, now)
        return WorkerLoad(
            member, link.connected, len(page.lives), page.num_prompt_tokens, stats, page.queue, page.decodes
        )

    def _page(self, worker: Name) -> _Page:
        page = self._pages.get(worker)
        if page is None:
            page = self._pages[worker] = _Page()
        return page

    def _derive(self, page: _Page, worker: Name, pool: Pool, now: float) -> None:
        self._end_step(page)
        page.queue = self._queue(page)
        page.num_prompt_tokens = sum([page.lives[name].request.num_tokens for name in page.prompts])
        here = [(name, live) for name, live in page.lives.items() if worker == live.decodes_on]
        page.decodes = self._decodes(here, pool, now) if here else NO_DECODES
        page.is_current = True

    def _decodes(self, here: list[tuple[str, LiveRequest]], pool: Pool, now: float) -> Decodes:
        num_tokens = sum([live.request.num_tokens + len(live.tokens) for _, live in here])
        step_s = self._predictor.decode_step_s(pool, len(here), num_tokens)
        return decodes_of([self._decode(name, live, step_s, now) for name, live in here])

    def _queue(self, page: _Page) -> Prompts:
        limits = self._limits
        return prompts_of(page.prompts.values(), page.since, limits.prefill_chunk, limits.max_batch_tokens)

    def _decode(self, name: str, live: LiveRequest, step_s: float, now: float) -> Decode:
        """How far it is follows from when it began and from the pace, as if nobody had counted: its tokens may be told
        of later than they are made."""
        forecast, total = self._forecasts[name], live.request.sampling.max_tokens * self._used_share
        begins, done = forecast.placed + forecast.ttft_s, forecast.num_done
        if live.is_prefilling:
            begins = max(now, begins)
        elif step_s:
            begins, done = now, done + max(0.0, now - forecast.began) / step_s
        left = _left(total, done)
        return Decode(begins + left * step_s, live.request.num_tokens + done + left / 2, live.request.service.tpot_s)


def _left(total: float, done: float) -> float:
    return max(total - done, LEAST_LEFT * done, 1.0)
