"""The controller: looks at the cluster every tick, plans, and has done what was planned.

1. `look` asks the gateways; their reports go into one window of arrivals and the newest word on each worker;
2. `plan` decides (planner.py, pure), and the journal gets what it decided and by what;
3. a flip is done beside the ticks, which go on and hold meanwhile; workers that come or leave do so by themselves.
It keeps nothing that it could not find again: who is what the workers say, and a window fills itself anew. So a new
one, after whatever ended the old, begins where that was, only more slowly. It knows no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.control.flip import Flippable, Flipped, flip
from cluster.control.journal import Journal
from cluster.control.planner import Flip, Memory, Plan, plan
from cluster.control.rules import ControllerConfig
from cluster.control.scale import Resize
from cluster.control.seen import Seen
from cluster.control.window import Look, Window
from engine.errors import SteelyardError
from engine.types import Role
from router.api import ControlView
from router.membership import Member
from router.report import GatewayReport

log = logging.getLogger(__name__)


class Fleet(Flippable, Protocol):
    """The cluster, as the controller sees it."""

    async def reports(self, view: ControlView) -> Sequence[GatewayReport]:
        """Of every gateway that answers in time; each is told how the controller is."""
        ...

    def members(self) -> Sequence[Member]: ...

    def is_whole(self) -> bool:
        """Is every worker there that should be? One that was added and has never been there may still be away."""
        ...

    def coming(self) -> Sequence[str]:
        """Workers that are not there, and will be."""
        ...

    def new(self) -> Sequence[str]:
        """Of these, those that were added and have never been there."""
        ...

    @property
    def num_leaving(self) -> int:
        """Workers that leave for good, and are no members any more."""
        ...

    def add(self, role: Role) -> str:
        """Have a worker come; its name."""
        ...

    def remove(self, worker_id: str, incarnation: str, limit_s: float) -> None:
        """Have this life of a worker leave for good, when what it has has moved on or ended, or after that time. From
        now on it is nobody's member. One that has no life yet does not come. If it is gone already, nothing happens."""
        ...


OnFlipped = Callable[[Flip, Flipped], None]
Decide = Callable[[Seen], Plan]


class Controller:
    def __init__(
        self, fleet: Fleet, rules: ControllerConfig, journal: Journal | None = None,
        on_flipped: OnFlipped = lambda _flip, _flipped: None, rival: Decide | None = None,
    ) -> None:  # fmt: skip
        """`on_flipped` hears what came of every flip. `rival`: by which it decides, instead of by our planner."""
        self._fleet = fleet
        self._rules = rules
        self._journal = journal
        self._on_flipped = on_flipped
        self._rival = rival
        self._window = Window(rules.window_s + rules.bucket_s, rules.stale_s)
        self._memory = Memory()
        self._flipping: asyncio.Task[None] | None = None
        self._done: list[Flipped] = []  # flips that the journal has not been told of
        self.view = ControlView(rules.mode, "hold: nothing has been seen yet")

    async def run(self) -> None:
        """Until it is cancelled; a flip that is under way then is undone or done."""
        try:
            while True:
                await asyncio.sleep(self._rules.tick_s)
                try:
                    await self.tick()
                except SteelyardError as error:
                    log.info("the controller holds: %s", error.message)
        finally:
            if self._flipping is not None:
                self._flipping.cancel()
                await asyncio.gather(self._flipping, return_exceptions=True)

    async def tick(self) -> Plan:
        """Look once, decide, and begin what was decided."""
        look = await self.look()
        kept, memory = self._window.kept, self._memory
        seen = self._window.after(look)
        if self._rival is not None:
            decided = self._rival(seen)
        else:
            decided, self._memory = plan(seen, memory, self._rules)
        if self._journal is not None:
            flipped, self._done = self._done, []
            self._journal.note(look, decided, flipped, memory, kept)
        self._note(decided, look)
        if decided.flip is not None and self._rules.mode == "auto":
            self._flipping = asyncio.get_running_loop().create_task(self._flip(decided.flip), name="flip")
        if decided.resize is not None and self._rules.mode == "auto":
            self._resize(decided.resize)
        return decided

    async def look(self) -> Look:
        reports = await self._fleet.reports(self.view)
        is_flipping = self._flipping is not None and not self._flipping.done()
        now = asyncio.get_running_loop().time()
        fleet = self._fleet
        return Look(
            now, tuple(reports), tuple(fleet.members()), is_flipping, fleet.is_whole(), tuple(fleet.coming()),
            tuple(fleet.new()), fleet.num_leaving,
        )  # fmt: skip

    async def flipped(self) -> None:
        """Returns when no flip is under way."""
        if self._flipping is not None:
            await asyncio.wait([self._flipping])

    def _is_together(self, look: Look) -> bool:
        """Does every worker serve both phases because it was meant so? A pool whose workers have died is not."""
        nobody_prefills = bool(look.members) and all(member.role is Role.DECODE for member in look.members)
        return self._rules.together and nobody_prefills and (look.is_whole or self.view.is_together)

    def _note(self, decided: Plan, look: Look) -> None:
        now, wanted, rate = decided.now, decided.best, self._memory.series[0]
        self.view = replace(
            self.view,
            reason=decided.reason,
            num_prefill=now.num_prefill if now else None,
            best_prefill=wanted.num_prefill if wanted else None,
            attained=now.attained if now else None,
            best_attained=wanted.attained if wanted else None,
            forecast_model=rate.model,
            forecast_error=rate.error,
            is_together=self._is_together(look),
            num_coming=len(look.coming),
        )

    def _resize(self, wished: Resize) -> None:
        """Both go on by themselves; the next looks tell."""
        log.info("%s", wished)
        for role in wished.add:
            self._fleet.add(role)
        if wished.remove:
            self._fleet.remove(wished.remove, wished.incarnation, self._rules.scale.drain_s)
        self.view = replace(
            self.view, num_added=self.view.num_added + len(wished.add),
            num_removed=self.view.num_removed + bool(wished.remove),
        )  # fmt: skip

    async def _flip(self, wished: Flip) -> None:
        rules = self._rules
        log.info("%s goes to %s", wished.worker_id, wished.to)
        try:
            done = await flip(
                self._fleet, wished.worker_id, wished.incarnation, wished.to, rules.evacuate_s, rules.flip_timeout_s
            )
        except SteelyardError as error:
            done = Flipped(wished.worker_id, _other(wished.to), 0.0, 0, error.message)
        except Exception as error:  # it must not end unheard
            log.exception("a flip failed")
            done = Flipped(wished.worker_id, _other(wished.to), 0.0, 0, repr(error))
        self._done.append(done)
        if done.problem:
            self.view = replace(self.view, num_undone=self.view.num_undone + 1)
            log.warning("%s was not flipped: %s", wished.worker_id, done.problem)
        else:
            self.view = replace(self.view, num_flips=self.view.num_flips + 1, last_flip_s=done.listed_s)
        self._on_flipped(wished, done)


def _other(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL
