"""Moves: live requests that go from one decode worker to another while their streams go on.

The source does it (decode_worker/mover.py); here the request gets its second key, tokens of both are taken meanwhile,
and what came of it is counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from engine.errors import InvalidRequest, Overloaded, TransferFailed, WorkerLost
from engine.types import Move, TokenOutput
from router.live import LiveRequest
from router.membership import Member
from router.policies.snapshot import Name
from router.rebalance import Running
from router.workers import WorkerLink

MOVE_TIMEOUT_S = 30.0  # copying included; the stream stands still for a small part of it


class Moves:
    """Implements router.rebalance.Mobile over the dispatcher's tables."""

    def __init__(self, lives: Mapping[str, LiveRequest], links: Mapping[Name, WorkerLink]) -> None:
        self._live = lives
        self._links = links
        self._counts: Counter[str] = Counter()  # by outcome

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """See router.api.HealthView.migrations."""
        return tuple(sorted(self._counts.items()))

    async def migrate(self, request_id: str, target: Member) -> None:
        """Move a request that generates to another worker, while its stream goes on. Returns when it runs there. Raises
        TransferFailed or Overloaded when it runs on where it was, InvalidRequest when it cannot move now."""
        live, link = self._where(request_id, target)
        migration = live.begin_migration(target)
        live.last_token_at = _now()
        move = Move(migration.before, target.endpoint, migration.after, live.deadline - _now())
        moved, outcome = None, "in doubt"
        try:
            await link.client.move(move, min(MOVE_TIMEOUT_S, move.timeout_s))
            moved, outcome = True, "moved"
        except (TransferFailed, Overloaded) as error:
            moved, outcome = False, error.code
            raise
        finally:
            self._counts[outcome] += 1
            live.end_migration(migration, moved)
            self._fail_if_cut_off(live)

    def _fail_if_cut_off(self, live: LiveRequest) -> None:
        """Where a link broke while the request moved, whoever broke it did not know that it would be there."""
        for name in live.workers:
            link = self._links.get(name)
            if link is None or not link.connected:
                live.fail(WorkerLost(f"worker {name[0]} was lost during a move"))
                return

    async def back_up(self, request_id: str, target: Member) -> None:
        """Copy what a request that generates has stored to another worker, so that it could soon move there. Raises as
        `migrate` does."""
        live, link = self._where(request_id, target)
        move = Move(live.key, target.endpoint, None, live.deadline - _now())
        await link.client.move(move, min(MOVE_TIMEOUT_S, move.timeout_s))

    def generating(self) -> list[Running]:
        """The requests that generate and do not move, as rebalancing sees them."""
        return [
            Running(name, live.decoder, len(live.request.prompt_ids) + len(live.tokens))
            for name, live in self._live.items()
            if live.decoder is not None and live.migration is None
        ]

    def _where(self, request_id: str, target: Member) -> tuple[LiveRequest, WorkerLink]:
        """The request and the worker that it could leave. Raises InvalidRequest."""
        live = self._live.get(request_id)
        source = live.decoder if live is not None else None
        link = self._links.get((source.worker_id, source.incarnation)) if source is not None else None
        is_there = source is not None and source.name == target.name
        if live is None or link is None or live.migration is not None or is_there:
            raise InvalidRequest(f"request {request_id} does not generate on a worker that it could leave")
        return live, link

    def with_pause(self, live: LiveRequest, output: TokenOutput) -> TokenOutput:
        """The first token after a migration tells how long the stream stood still."""
        moving = live.migration
        if moving is None or not live.follows(output):
            return output
        before, live.last_token_at = live.last_token_at, _now()
        if output.key != moving.after:
            return output
        return replace(output, stages=(*output.stages, ("migration_pause", live.last_token_at - before)))


def _now() -> float:
    return asyncio.get_running_loop().time()
