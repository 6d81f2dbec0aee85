"""The placer: asks the policy where a request goes, lets it wait while it is not to go anywhere yet, or refuses it.

1. `choose` makes a snapshot of what is known now, and the policy decides by it;
2. a request that is to wait takes a seat in the waiting room, and is decided on again when it is called;
3. a refusal is Overloaded, with the time at which a client that comes back is expected to be taken;
4. `changed` hears of each change in where live requests are: the book files it, and who waits is called.
It holds what decisions rest on: the book, the policy's memory, and by how much predictions were off; and notes what
comes and how it fares, for whoever sizes the pools.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from engine.errors import Overloaded, Unavailable
from engine.types import MEAN, Role
from router.arrivals import Arrivals, Arrived, Fared
from router.book import Book
from router.canary import CANARY
from router.config import RouterConfig
from router.learnt import Learnt
from router.live import LiveRequest
from router.margin import TtftErrors
from router.membership import Pool
from router.policies import POLICIES
from router.policies.fleet import Fleet
from router.policies.snapshot import (
    Ask,
    Decision,
    EngineLimits,
    Memory,
    Name,
    Placement,
    Predictor,
    Refuse,
    Return,
    Snapshot,
    Wait,
    has_targets,
)
from router.report import Times
from router.waiting_room import Ticket, WaitingRoom
from router.workers import WorkerLink

PROMISED_FOR_S = 10.0  # after the last request with targets, others yield no longer
MEMORY_RATE = 0.05  # of the mean prompt
MOST_RETURNS = 1024  # of refused clients that are reckoned with
BEHIND, FULL, WORKER = "behind others", "full", "worker"
WORDS = {
    "ttft": "The first token would be late", "tpot": "Tokens would come too slowly", "blocks": "There is no room",
    "seats": "No worker has a seat for it", "yields": "Others go first", BEHIND: "Others wait before it",
    FULL: "Too many wait already", WORKER: "Workers have no room for it",
}  # fmt: skip


class Placer:
    def __init__(
        self, config: RouterConfig, links: Mapping[Name, WorkerLink], learnt: Learnt, predictor: Predictor,
        limits: EngineLimits, now: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config = config
        self._policy = POLICIES[config.policy]
        self._links = links
        self._learnt = learnt
        self._predictor = predictor
        self._limits = limits
        self._now = now
        self._book = Book(self._predictor, limits)
        self._errors = TtftErrors()
        self.arrivals = Arrivals()
        self._room = WaitingRoom(config.max_waiting)
        self._memory = Memory()
        self._promised_at = -math.inf
        self._num_decided: Counter[tuple[str, str]] = Counter()

    @property
    def counts(self) -> tuple[tuple[str, str, int], ...]:
        """See router.api.HealthView.admissions."""
        return tuple((*key, count) for key, count in sorted(self._num_decided.items()))

    @property
    def num_waiting(self) -> int:
        return len(self._room)

    def loads(self) -> Fleet:
        """Every linked worker's load, derived from the live requests and its last report."""
        now = self._now()
        return self._book.loads(self._links.values(), now)

    @property
    def times(self) -> Times:
        return Times(self._predictor, self._limits)

    def expected_left(self, live: LiveRequest) -> float:
        """Tokens still to come."""
        return self._book.expected_output(live)

    # --- one request ------------------------------------------------------------------------------------------

    async def choose(self, live: LiveRequest) -> Placement:
        """May wait; the caller bounds that. Raises Overloaded, or Unavailable if nobody can be reached."""
        cached = self.cached(live)
        self._note_arrival(live, cached)
        if has_targets(live.request.service):
            self._promised_at = self._now()
        decision: Decision = self._first_decision(live, cached)
        ticket: Ticket | None = None
        try:
            while isinstance(decision, Wait):
                if ticket is None and self._room.is_full and not live.tokens:
                    decision = Refuse(FULL, 1.0)
                    break
                if ticket is None:
                    ticket = self._room.enter(live.request.service.priority, live.first_due)
                    self._num_decided["waited", decision.reason] += 1
                decision = await self._decide_when_called(live, cached, ticket, decision)
        finally:
            if ticket is not None:
                self._room.leave(ticket)
        if isinstance(decision, Refuse):
            raise self._refusal(live, decision)
        self._num_decided["admitted", "targets" if has_targets(live.request.service) else "no targets"] += 1
        self._remember(live, decision)
        return decision

    def _note_arrival(self, live: LiveRequest, cached: Mapping[Name, int]) -> None:
        """The first time that it is to be placed."""
        if live.num_refusals or live.num_failures or live.tokens or not self._links or not _counts(live):
            return
        request, now = live.request, self._now()
        num_cached = min(max(cached.values(), default=0), request.num_tokens - 1)
        pool = self._prompt_pool()
        chunk = self._limits.prefill_chunk
        compute_s = self._predictor.prefill_s(pool, request.num_tokens - num_cached, num_cached, chunk)
        num_output = self._book.expected_output(live) * len(live.placed_together)
        service = request.service
        self.arrivals.came(
            Arrived(now, request.num_tokens, num_cached, num_output, compute_s, service.ttft_s, service.tpot_s)
        )

    def _first_decision(self, live: LiveRequest, cached: Mapping[Name, int]) -> Decision:
        """Without targets nobody goes before those who wait already."""
        service = live.request.service
        if not has_targets(service) and self._room.has_before(service.priority, live.first_due):
            return Wait(BEHIND)
        return self._decide(live, cached)

    async def _decide_when_called(
        self, live: LiveRequest, cached: Mapping[Name, int], ticket: Ticket, wait: Wait
    ) -> Decision:
        ticket.called.clear()
        try:
            async with asyncio.timeout(wait.until_s if math.isfinite(wait.until_s) else None):
                await ticket.called.wait()
        except TimeoutError:
            decision = self._decide(live, cached)
            return Refuse(decision.reason, 1.0) if isinstance(decision, Wait) else decision
        return self._decide(live, cached)

    def _decide(self, live: LiveRequest, cached: Mapping[Name, int]) -> Decision:
        policy = POLICIES["least_load"] if live.request.namespace == CANARY else self._policy
        decision = policy(self.snapshot(live, cached))
        if isinstance(decision, Refuse) and live.tokens:  # its client has a part of the answer: that was a promise
            decision = POLICIES["least_load"](self.snapshot(live, cached))
        if decision is None:
            raise Unavailable("no worker can be reached", retry_after_s=1)
        if isinstance(decision, Placement) and live.request.sampling.embed:  # nothing to hand off
            decision = replace(decision, decode=None)
        return decision

    def snapshot(self, live: LiveRequest, cached: Mapping[Name, int]) -> Snapshot:
        now = self._now()
        if any(one.at <= now for one in self._memory.returns):
            self._memory = replace(self._memory, returns=tuple(one for one in self._memory.returns if one.at > now))
        return Snapshot(
            now, self.loads(), self._ask(live, cached, now), self._predictor, self._limits, self._errors.margin,
            self._memory, now - self._promised_at < PROMISED_FOR_S,
        )  # fmt: skip

    def _ask(self, live: LiveRequest, cached: Mapping[Name, int], now: float) -> Ask:
        request, done = live.request, len(live.tokens)
        service = request.service
        ttft_s, tpot_s, priority = live.first_due - now, service.tpot_s, service.priority
        if done:  # it has its first token, and is let down by nothing more than by not going on
            ttft_s, tpot_s, priority = math.inf, math.inf, 0
        return Ask(
            request.num_tokens + done, max(1, request.sampling.max_tokens - done), self._book.expected_output(live),
            ttft_s, tpot_s, priority, len(live.placed_together), not live.shuns_wire, cached, live.refused_by,
            bool(request.sampling.embed),
        )  # fmt: skip

    def cached(self, live: LiveRequest) -> Mapping[Name, int]:
        """What is known to be where; after a refused hand-off the chunk with which it was offered is, too."""
        if live.request.sampling.embed == MEAN:  # it takes nothing from a cache
            return {}
        cached = self._learnt.num_cached(live)
        if live.refused_after is None:
            return cached
        size, num_tokens = self._limits.block_size, live.request.num_tokens + len(live.tokens)
        num_done = min(num_tokens, self._limits.prefill_chunk) // size * size
        return {**cached, live.refused_after: max(cached.get(live.refused_after, 0), num_done)}

    def _remember(self, live: LiveRequest, placement: Placement) -> None:
        memory, num_prompt = self._memory, live.request.num_tokens
        mean = memory.mean_prompt + MEMORY_RATE * (num_prompt - memory.mean_prompt) if memory.turn else num_prompt
        first = (placement.first.worker_id, placement.first.incarnation)
        short_batch = first if num_prompt <= mean else memory.short_batch
        self._memory = replace(memory, turn=memory.turn + 1, mean_prompt=mean, short_batch=short_batch)
        self._room.call()

    # --- what happens -----------------------------------------------------------------------------------------

    def placed(self, live: LiveRequest, placement: Placement) -> None:
        """It has just been given this placement."""
        num_cached = self.cached(live).get((placement.first.worker_id, placement.first.incarnation), 0)
        self._book.placed(live, placement, num_cached, self._now())

    def changed(self, live: LiveRequest) -> None:
        """Its workers or its phase may be others now."""
        now = self._now()
        has_token = live.placement is not None and not live.is_prefilling
        if has_token and live.began_at is None:
            live.began_at = now
        foretold = self._book.foretold(live) if has_token else None
        if foretold is not None:
            predicted_s, measured_s = foretold.at - foretold.placed, now - foretold.placed
            self._errors.add(predicted_s, measured_s)
            self._learnt.predictor.judge_ttft(predicted_s, measured_s)
        self._book.note(live, now)
        self._room.call()

    def ended(self, live: LiveRequest) -> None:
        """Nobody wants more of it."""
        now = self._now()
        self._book.ended(live, now)
        if (live.is_finished or live.refused or now > live.first_due) and _counts(live):
            self.arrivals.fared(_fared(live, now))
        self._room.call()

    def heard(self, worker: Name) -> None:
        """It has reported, or its stream broke."""
        self._book.heard(worker)

    def members_changed(self) -> None:
        """Links have come or gone, or their members are others."""
        self._book.members_changed()

    def call_waiting(self) -> None:
        """A worker has reported without outputs, or has come: what other gateways do shows in that alone."""
        self._room.call()

    def refused_by_workers(self, live: LiveRequest) -> Overloaded:
        """They had the last word."""
        decision = self._decide(live, self.cached(live))
        return self._refusal(live, Refuse(WORKER, decision.retry_after_s if isinstance(decision, Refuse) else 1.0))

    def _prompt_pool(self) -> Pool:
        """Of those that compute prompts: where nobody prefills alone, the others do. Somebody is linked."""
        members = [link.member for link in self._links.values()]
        first = next((member for member in members if member.role is Role.PREFILL), members[0])
        return first.pool

    def _refusal(self, live: LiveRequest, refuse: Refuse) -> Overloaded:
        live.refused = refuse.reason
        self._num_decided["refused", refuse.reason] += 1
        retry_after_s = float(max(1, math.ceil(refuse.retry_after_s)))  # as HTTP tells it, in whole seconds
        pool = self._prompt_pool()
        compute_s = self._predictor.prefill_s(pool, live.request.num_tokens, 0, self._limits.prefill_chunk)
        back = Return(self._now() + retry_after_s, compute_s)
        self._memory = replace(self._memory, returns=(*self._memory.returns, back)[-MOST_RETURNS:])
        return Overloaded(f"{WORDS[refuse.reason]}; come back in {retry_after_s:g} s", retry_after_s=retry_after_s)


def _counts(live: LiveRequest) -> bool:
    """Is it of a client's, and the first of its answers?"""
    return live.request.namespace != CANARY and not live.is_sibling


def _fared(live: LiveRequest, now: float) -> Fared:
    """`now`: its last token has just come, or none will."""
    if live.began_at is None:
        return Fared(now, live.refused, not has_targets(live.request.service), True)
    num_more = max(1, len(live.tokens) - 1)
    tpot_s = (now - live.began_at) / num_more
    return Fared(now, live.refused, live.began_at <= live.first_due, tpot_s <= live.request.service.tpot_s)
