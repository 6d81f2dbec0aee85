"""The prefill queue: in which order prompts are computed, and how far ahead of need the engine gets them. Pure.

Among those that wait, in this order:
1. every `oldest_every`-th start is the oldest's: nobody waits for ever, whatever else comes;
2. who has the lower priority number: those of a higher one run when nobody else waits;
3. who can still give its first token in time. Who cannot is served all the same, behind those that can;
4. whose tenant has not been served more than another that waits, by `fairness_tokens` (prefill_worker/tenants.py). The
   turn of the oldest, too, goes by this;
5. whose first token is due earliest; without a target that is `default_ttft_s` after its arrival. While the engine has
   a long prompt others wait, and are passed by short ones that are due later as far as they come in time all the same.

The engine takes what it was given in its own order, so it is given little: short prompts for two steps (the one that is
computed and the next), steps as large as makes a token cheapest (prefill_worker/knee.py) or as the slack of those that
decode here allows; and one long prompt, which takes more than a step, beside them. And nothing while unclaimed blocks
fill the outbox's share, nor anything that would make late what the engine has. A start looks once at all that waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.errors import Overloaded
from engine.types import EngineStats, Key, Submission
from prefill_worker.tenants import Tenants


@dataclass(frozen=True, slots=True)
class QueueRules:
    """See prefill_worker/config.py; the last three are the engine's."""

    max_queue: int = 1024
    outbox_fraction: float = 0.3
    default_ttft_s: float = 2.0
    oldest_every: int = 8
    fairness_tokens: int = 1024
    prompt_weight: float = 1.0
    output_weight: float = 2.0
    prefill_chunk: int = 256
    max_batch_tokens: int = 512
    max_batch_seqs: int = 64


@dataclass(slots=True, eq=False)
class Waiting:
    """A submission in the queue; times are of the running loop's clock. `compute_s`: of its prompt, as predicted."""

    number: int  # in order of arrival
    submission: Submission
    arrived: float
    compute_s: float
    due: float  # its first token
    lost_after: float  # what was promised to it cannot be kept if it starts later
    priority: int
    tenant: str
    num_tokens: int

    @property
    def deadline(self) -> float:
        return self.arrived + self.submission.request.timeout_s


@dataclass(frozen=True, slots=True)
class Given:
    """What the engine has without a first token yet: tokens of short prompts, and whether there is a long one."""

    num: int = 0
    num_short_tokens: int = 0
    has_long: bool = False
    left_s: float = 0.0  # until all of it is computed, as predicted
    slack_s: float = math.inf  # by how much more all of it can be held up, so that nobody in it is late


@dataclass(frozen=True, slots=True)
class Totals:
    num_tokens: int
    compute_s: float


_Group = tuple[int, bool]  # priority, is lost


@dataclass(slots=True, eq=False)
class PrefillQueue:
    rules: QueueRules
    tenants: Tenants = field(default_factory=Tenants)
    _waiting: dict[int, Waiting] = field(default_factory=dict)  # by number, oldest first
    _of_tenant: dict[str, dict[int, Waiting]] = field(default_factory=dict)  # the same; none is empty
    _next_number: int = 0
    _num_since_oldest: int = 0  # starts
    _totals: Totals | None = None  # of what waits, unless that has changed

    def __len__(self) -> int:
        return len(self._waiting)

    def waiting(self, submission: Submission, now: float, compute_s: float = 0.0) -> Waiting:
        """A submission as it would wait here."""
        request, service = submission.request, submission.request.service
        due = now + (service.ttft_s if math.isfinite(service.ttft_s) else self.rules.default_ttft_s)
        lost_after = now - compute_s + service.ttft_s
        return Waiting(
            self._next_number, submission, now, compute_s, due, lost_after,
            service.priority, service.tenant, request.num_tokens,
        )  # fmt: skip

    def push(self, waiting: Waiting) -> None:
        """Raises Overloaded when the queue is full."""
        if len(self._waiting) >= self.rules.max_queue:
            raise Overloaded(f"{len(self._waiting)} requests wait for prefill already", retry_after_s=1)
        if waiting.tenant not in self._of_tenant:
            self.tenants.arrive(waiting.tenant, self._of_tenant)
        waiting.number = self._next_number
        self._waiting[waiting.number] = waiting
        self._of_tenant.setdefault(waiting.tenant, {})[waiting.number] = waiting
        self._next_number += 1
        self._totals = None

    def pop_ready(self, stats: EngineStats, given: Given, now: float, step_tokens: int) -> Waiting | None:
        """The next to start, or None while the engine has enough or unclaimed blocks fill the outbox's share.
        `step_tokens`: that a step should have."""
        room = stats.num_held_blocks <= self.rules.outbox_fraction * stats.num_blocks
        full = given.num >= self.rules.max_batch_seqs or given.num_short_tokens >= 2 * step_tokens
        if not self._waiting or full or not room:
            return None
        oldest = self._oldest()
        found = self._choose(oldest, given, now)
        if found is None or not self._has_room(found, given, step_tokens):
            return None
        self._num_since_oldest = 0 if found is oldest else self._num_since_oldest + 1
        self._take_out(found)
        self.tenants.charge(found.tenant, self.rules.prompt_weight * found.num_tokens)
        return found

    def remove(self, key: Key) -> bool:
        """Take an answer that was aborted out of its submission, and this with its last one out of the queue."""
        found = next((one for one in self._waiting.values() if key in [r.key for r in one.submission.requests]), None)
        if found is None:
            return False
        kept = [one for one in found.submission.requests if one.key != key]
        if kept:
            found.submission = replace(found.submission, request=kept[0], siblings=tuple(kept[1:]))
        else:
            self._take_out(found)
        return True

    def charge_output(self, tenant: str, num_tokens: int) -> None:
        """This worker has generated so many tokens for it."""
        self.tenants.charge(tenant, self.rules.output_weight * num_tokens)

    @property
    def totals(self) -> Totals:
        """Prompt positions that wait, and how long computing them takes."""
        if self._totals is None:
            waiting = self._waiting.values()
            self._totals = Totals(sum(one.num_tokens for one in waiting), sum(one.compute_s for one in waiting))
        return self._totals

    def before_s(self, new: Waiting, now: float) -> float:
        """How long computing those takes that go before it if nobody else comes. Tenants' shares are left out."""
        mine = new.priority, new.lost_after < now, new.due
        waiting = self._waiting.values()
        return sum(one.compute_s for one in waiting if (one.priority, one.lost_after < now, one.due) <= mine)

    # --- parts -----------------------------------------------------------------------------------------------

    def _oldest(self) -> Waiting:
        """Of the tenants that have not been served too much more than another that waits."""
        firsts = {tenant: next(iter(waiting.values())) for tenant, waiting in self._of_tenant.items()}
        return min(self._fair(firsts), key=lambda one: one.number)

    def _choose(self, oldest: Waiting, given: Given, now: float) -> Waiting | None:
        """Whose turn it is. The engine has no more than one long prompt: the oldest, if it is long, keeps its turn."""
        if self._num_since_oldest + 1 >= self.rules.oldest_every and not (given.has_long and self._is_long(oldest)):
            return oldest
        held = self._held_long(given, now)
        first: _Group | None = None
        earliest: dict[str, Waiting] = {}  # by tenant, in the first group
        for one in self._waiting.values():
            group = one.priority, one.lost_after < now
            if (first is not None and group > first) or (given.has_long and self._is_long(one)):
                continue
            if any(one.due > long.due and one.compute_s > slack_s for long, slack_s in held):
                continue
            if group != first:
                first, earliest = group, {}
            known = earliest.get(one.tenant)
            if known is None or one.due < known.due:
                earliest[one.tenant] = one
        return min(self._fair(earliest), key=lambda one: (one.due, one.number)) if earliest else None

    def _held_long(self, given: Given, now: float) -> list[tuple[Waiting, float]]:
        """Long prompts that wait for the one that the engine has, and by how much more each could be held up: those of
        later turns pass it only as far as it comes in time all the same."""
        if not given.has_long:
            return []
        waiting = [one for one in self._waiting.values() if self._is_long(one) and one.lost_after >= now]
        held, free_at = list[tuple[Waiting, float]](), now + given.left_s
        for one in sorted(waiting, key=lambda one: one.due):
            free_at += one.compute_s
            held.append((one, one.due - free_at))
        return held

    def _fair(self, of_tenant: Mapping[str, Waiting]) -> list[Waiting]:
        """Without those whose tenants have been served too much more than another of these."""
        served = {tenant: self.tenants.served(tenant) for tenant in of_tenant}
        most = min(served.values()) + self.rules.fairness_tokens
        return [one for tenant, one in of_tenant.items() if served[tenant] <= most]

    def _is_long(self, waiting: Waiting) -> bool:
        return waiting.num_tokens > self.rules.prefill_chunk

    def _has_room(self, waiting: Waiting, given: Given, step_tokens: int) -> bool:
        if given.num and waiting.compute_s > given.slack_s:
            return False
        if self._is_long(waiting):
            return given.num_short_tokens <= step_tokens
        return not given.num_short_tokens or given.num_short_tokens + waiting.num_tokens <= 2 * step_tokens

    def _take_out(self, waiting: Waiting) -> None:
        del self._waiting[waiting.number], self._of_tenant[waiting.tenant][waiting.number]
        if not self._of_tenant[waiting.tenant]:
            del self._of_tenant[waiting.tenant]
            self.tenants.leave(waiting.tenant)
        self._totals = None
