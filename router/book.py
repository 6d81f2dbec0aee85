"""The book: what every worker has of our live requests, and what these will take of it as predicted.

1. `placed` predicts a placement when it is made;
2. `note` hears of each request that is placed, gives its first token, is handed off, moves, or ends, and files it
   under the workers that it is on;
3. `load` derives a worker's load from what is filed there, when that has changed since it was last asked, or when a
   request there has outlived its prediction; `loads` makes anew of all workers' those that may be others
   (router/kept_loads.py). So a decision costs as much as has changed.

Nothing is counted up and down: what is filed are the live requests themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from router.kept_loads import KeptLoads, Link
from router.live import LiveRequest
from router.membership import Pool
from router.policies.fleet import Fleet
from router.policies.occupancy import NO_DECODES, NO_PROMPTS, Decodes, Prompts, decodes_of, prompts_of, turn_of
from router.policies.rehearsal import Prompt, progressed
from router.policies.snapshot import EngineLimits, Name, Placement, Predictor, WorkerLoad

LEAST_LEFT = 0.05  # of what it has generated: one that has outlived its prediction is expected to go on for so long
LEARNING_RATE = 0.02


@dataclass(slots=True, eq=False)
class _Page:
    """Of one worker: who is on it, whose prompts it has, and what follows from that until it changes."""

    lives: dict[str, LiveRequest] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)  # of these, what decodes here or will
    prompts: dict[str, Prompt] = field(default_factory=dict)
    since: float = 0.0  # when it began with the first of its prompts
    finished: set[str] = field(default_factory=set)  # of its prompts, with the step that ended at `ended`
    ended: float = 0.0
    queue_is_current: bool = True
    num_prompt_tokens: int = 0
    queue: Prompts = NO_PROMPTS
    decodes_are_current: bool = True
    decodes: Decodes = NO_DECODES


@dataclass(frozen=True, slots=True)
class _Forecast:
    """Of one placement, when it was made: `num_done` tokens had been generated. `began`: when its first token came."""

    placed: float
    ttft_s: float
    prompt: Prompt
    num_done: int
    began: float = 0.0


class _Running(NamedTuple):
    """What the rest of a request's life follows from, as of its last change: a decision asks it of dozens, and would
    look for it in five records of each."""

    num_known: int  # tokens of the request as it came
    max_tokens: int
    tpot_s: float  # its target
    begins: float  # when its first token was to come
    num_done: int  # by then
    began: float  # when it came; infinite: not yet


class Foretold(NamedTuple):
    """A first token: when its request was placed, and when it was to come."""

    placed: float
    at: float


class Book:
    def __init__(self, predictor: Predictor, limits: EngineLimits) -> None:
        self._predictor = predictor
        self._limits = limits
        self._pages: dict[Name, _Page] = {}
        self._where: dict[str, tuple[Name, ...]] = {}
        self._forecasts: dict[str, _Forecast] = {}
        self._kept = KeptLoads(self.load)
        self._used_share = 1.0  # of the tokens that requests ask for at most, what they use on average

    def expected_output(self, live: LiveRequest) -> float:
        """Tokens still to come."""
        return _left(live.request.sampling.max_tokens * self._used_share, len(live.tokens))

    def foretold(self, live: LiveRequest) -> Foretold | None:
        """Of a request whose first token has just come: when it was expected, with all that was placed after it. None
        once that is noted: the end of its hand-off is no first token."""
        name = live.request.request_id
        for worker in self._where.get(name, ()):
            page = self._pages[worker]
            prompt = page.prompts.get(name)
            if prompt is not None and name not in page.finished:
                queue = self._queue(page)
                return Foretold(prompt.placed, queue.ends[queue.all.index(prompt)])
        return None

    # --- what happens ----------------------------------------------------------------------------------------

    def placed(self, live: LiveRequest, placement: Placement, num_cached: int, now: float) -> None:
        """It is about to get this placement. `num_cached` positions of its beginning are where it is computed."""
        first = placement.first
        num_new = max(1, live.request.num_tokens + len(live.tokens) - num_cached)
        compute_s = placement.own_s  # beside others that decode it takes longer than alone
        if compute_s is None:
            compute_s = self._predictor.prefill_s(first.pool, num_new, num_cached, self._limits.prefill_chunk)
        prompt = Prompt(live.first_due, now, num_new, compute_s, num_new)
        ttft_s = placement.ttft_s
        if ttft_s is None:
            page = self._pages.get(first.name)
            queue = NO_PROMPTS
            if page is not None:
                self._end_step(page)
                queue = self._queue(page)
            ttft_s = queue.around_s(live.first_due, now)[0] + compute_s
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
        if has_token and not forecast.began:
            forecast = self._forecasts[name] = replace(forecast, began=now)
        workers = live.workers
        for worker in workers:
            page = self._page(worker)
            page.lives[name] = live
            if worker == live.decodes_on:
                page.running[name] = _running(live, forecast)
            self._touch(worker)
        if workers:
            self._where[name] = workers
        if live.first_worker is not None and live.is_prefilling and live.leader is None:
            page = self._page(live.first_worker)
            self._end_step(page)
            page.since = page.since if page.prompts else now
            page.prompts[name] = forecast.prompt
            page.queue_is_current = False

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
            page.running.pop(name, None)
            if name in page.prompts and has_token:
                page.finished.add(name)
                page.ended = now
            elif name in page.prompts:
                self._end_step(page)
                page.prompts.pop(name, None)
                page.queue_is_current = False
            if not page.lives:
                del self._pages[worker]

    def _touch(self, worker: Name) -> None:
        self._pages[worker].decodes_are_current = False
        self._kept.touch(worker)

    def _end_step(self, page: _Page) -> None:
        """First tokens tell of a step's end. What of its time was not theirs was for others: work is neither lost nor
        made, so that an error of one prediction is not one of all that come after it."""
        if not page.finished:
            return
        done = [page.prompts.pop(name) for name in sorted(page.finished)]
        page.finished.clear()
        work_s = page.ended - page.since - sum(one.left_s for one in done)
        ordered = sorted(page.prompts, key=lambda name: turn_of(page.prompts[name]))
        after = progressed([page.prompts[name] for name in ordered], work_s, self._limits.prefill_chunk)
        page.prompts = dict(zip(ordered, after, strict=True))
        page.since = page.ended
        page.queue_is_current = False

    # --- what follows ----------------------------------------------------------------------------------------

    def heard(self, worker: Name) -> None:
        """It has reported, or its stream broke."""
        self._kept.heard(worker)

    def members_changed(self) -> None:
        """Links have come or gone, or their members are others."""
        self._kept.members_changed()

    def loads(self, links: Collection[Link], now: float) -> Fleet:
        """Of all links, as far as there was news of them."""
        return self._kept.all(links, now)

    def load(self, link: Link, now: float) -> WorkerLoad:
        member, stats = link.member, link.stats
        page = self._pages.get(member.name)
        if page is None:
            return WorkerLoad(member, link.takes_requests, 0, 0, stats)
        self._end_step(page)
        queue = self._queue(page)
        if not page.decodes_are_current or (page.decodes.ends and page.decodes.ends[0] < now):
            page.decodes = self._decodes(page, member.pool, now)
            page.decodes_are_current = True
        return WorkerLoad(
            member, link.takes_requests, len(page.lives), page.num_prompt_tokens, stats, queue, page.decodes
        )

    def _page(self, worker: Name) -> _Page:
        page = self._pages.get(worker)
        if page is None:
            page = self._pages[worker] = _Page()
        return page

    def _queue(self, page: _Page) -> Prompts:
        if not page.queue_is_current:
            limits = self._limits
            page.queue = prompts_of(page.prompts.values(), page.since, limits.prefill_chunk, limits.max_batch_tokens)
            page.num_prompt_tokens = sum([page.lives[name].request.num_tokens for name in page.prompts])
            page.queue_is_current = True
        return page.queue

    def _decodes(self, page: _Page, pool: Pool, now: float) -> Decodes:
        """How far each is follows from when it began and from the pace, as if nobody had counted: its tokens may be
        told of later than they are made. A step is taken to find each in the middle of its life."""
        running, used_share = page.running.values(), self._used_share
        if not running:
            return NO_DECODES
        num_tokens = sum([one.num_known + (one.num_done + one.max_tokens * used_share) / 2 for one in running])
        step_s = self._predictor.decode_step_s(pool, len(running), round(num_tokens))
        decodes: list[tuple[float, float, float]] = []  # as Decode; there are dozens
        for num_known, max_tokens, tpot_s, begins, num_done, began in running:
            at, done = max(now, begins), float(num_done)
            if began < math.inf:
                at, done = (now, done + max(0.0, now - began) / step_s) if step_s else (begins, done)
            left = _left(max_tokens * used_share, done)
            decodes.append((at + left * step_s, num_known + done + left / 2, tpot_s))
        return decodes_of(decodes)


def _running(live: LiveRequest, forecast: _Forecast) -> _Running:
    request = live.request
    return _Running(
        request.num_tokens, request.sampling.max_tokens, request.service.tpot_s,
        forecast.placed + forecast.ttft_s, forecast.num_done, math.inf if live.is_prefilling else forecast.began,
    )  # fmt: skip


def _left(total: float, done: float) -> float:
    return max(total - done, LEAST_LEFT * done, 1.0)
