"""A live request: its token log, its placement, and what has come from workers. Owned by exactly one gateway.

Outputs are taken only in order: of the present epoch, at index = next. What follows one gap is held back, because the
second token and more may overtake the first (it comes from another worker). Whatever is older or doubled is dropped.

A migration moves it from one decode worker to another under a new epoch. Meanwhile tokens of both epochs are taken,
each index once: they are the same.

Several answers to one prompt are live requests of their own. Until its first token each follows the first of them: it
is placed with it, and when that placement fails, placed again with it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from engine.errors import DeadlineExceeded, SteelyardError, WorkerLost, error_from_code
from engine.types import FinishReason, Key, Request, TokenOutput
from router.block_names import BlockNames
from router.membership import Member
from router.merge import Backlog
from router.policies.snapshot import Name, Placement


@dataclass(frozen=True, slots=True)
class Migration:
    """From one worker to another: the request's key there and here."""

    before: Key
    after: Key
    source: Member
    target: Member


@dataclass(slots=True, eq=False)
class LiveRequest:
    request: Request
    deadline: float  # on the running loop's clock
    first_due: float = math.inf  # its first token; infinite: nothing was promised
    changed: Callable[[LiveRequest], None] = lambda _live: None  # hears when its workers or its phase may be others
    epoch: int = 0
    tokens: list[int] = field(default_factory=list)  # delivered, in order
    placement: Placement | None = None
    handed_off: bool = False  # in this epoch tokens have come from the decode worker
    cached_tokens: int | None = None  # of the first placement: what usage reports
    num_refusals: int = 0  # placements that found no room
    num_failures: int = 0  # placements that failed otherwise
    refused_by: Name | None = None  # who had no room for its last placement's hand-off
    refused_after: Name | None = None  # and who had computed its first chunk by then
    refused_at_once: bool = False  # its last placement was not taken by its first worker
    shuns_wire: bool = False  # the last placement failed in its transfer: the next one makes none
    leader: LiveRequest | None = None  # that it follows
    followers: list[LiveRequest] = field(default_factory=list)
    is_sibling: bool = False  # it has followed one
    migration: Migration | None = None  # the last one of this placement, until tokens have come of its end alone
    last_token_at: float = 0.0  # while it moves
    names: BlockNames | None = None  # once they were asked for
    is_finished: bool = False  # its last token has come
    began_at: float | None = None  # when its first token came
    refused: str = ""  # by admission, for lack of what
    tap: Callable[[TokenOutput], bool] | None = None  # takes outputs while its reader waits; False: the reader's
    stages: tuple[tuple[str, float], ...] = ()  # of this gateway, to be told with the next output
    last_heard: float = 0.0  # when it was placed, or when tokens of this placement last came
    has_expired: bool = False  # its deadline passed
    is_cancelled: bool = False  # nobody wants more of it
    patience: asyncio.Timeout | None = None  # of who places it, at this moment
    _in_doubt: bool = False  # may it have moved?
    _last_epoch: int = 0  # that was ever given
    first_epoch: int = 0  # of this placement; each migration raises the epoch
    _first_index: int = 0  # of the first token of this placement
    _next_index: int = 0  # of the next token to be queued for the client
    _held: list[TokenOutput] = field(default_factory=list)  # what follows a gap, itself without one
    _events: Backlog = field(default_factory=Backlog)  # what the client has not taken yet

    @property
    def key(self) -> Key:
        return Key(self.request.request_id, self.epoch)

    def place(self, placement: Placement) -> None:
        """Begin a new placement: everything of earlier ones is void."""
        if self.placement is not None:
            self._raise_epoch()
        self.placement = placement
        self.handed_off = self.refused_at_once = False
        self.migration = None
        self._held = []
        self._first_index = self._next_index = len(self.tokens)
        self._events.clear()
        self.changed(self)

    def void(self) -> None:
        """The placement is given up, and there is no other yet: what came of it, and still comes, is stale."""
        self.placement = self.migration = None
        self._raise_epoch()
        self._events.clear()
        self.changed(self)

    def _raise_epoch(self) -> None:
        self.epoch = self.first_epoch = self._last_epoch = self._last_epoch + 1

    # --- migration -----------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Member | None:
        """The worker on which it generates, once tokens have come from there."""
        if self.placement is None or self.is_prefilling:
            return None
        if self.placement.decode is None:
            return self.placement.first
        return self.placement.decode if self.handed_off else None

    def begin_migration(self, target: Member) -> Migration:
        """From now on tokens may come under either key, each index once."""
        source = self.decoder
        assert source is not None and self.migration is None, "it generates, and does not move yet"
        self._last_epoch += 1
        self._in_doubt = False
        self.migration = Migration(self.key, Key(self.key.request_id, self._last_epoch), source, target)
        self.changed(self)
        return self.migration

    def end_migration(self, migration: Migration, moved: bool | None) -> None:
        """What the source said, or None if it said nothing. When it did not move, what still comes of the other end is
        stale."""
        if self.migration is not migration:
            return
        if moved is None:
            self._in_doubt = True
        elif moved:
            self._arrive(migration)
        elif self.key == migration.before:
            self.migration = None
        self.changed(self)

    def _arrive(self, migration: Migration) -> None:
        """It runs at the target now. The last tokens of the source may still be under way."""
        assert self.placement is not None
        self.epoch = migration.after.epoch
        self.placement = replace(self.placement, decode=migration.target)
        self.handed_off = True

    @property
    def ends(self) -> tuple[tuple[Member, Key], ...]:
        """Where it may run, and under which keys."""
        placement, moving = self.placement, self.migration
        members = (placement.first, placement.decode) if placement is not None else ()
        ends = [(member, self.key) for member in members if member is not None]
        if moving is not None:
            ends += [(moving.source, moving.before), (moving.target, moving.after)]
        return tuple(dict.fromkeys(ends))

    def follows(self, output: TokenOutput) -> bool:
        """Are its tokens the next ones?"""
        return self.awaits(output.key) and output.first_index == self._next_index

    def is_stray(self, output: TokenOutput) -> bool:
        """Is it of a placement that is given up, or of the end of a migration that has fallen behind?"""
        if self.migration is None:
            return not self.awaits(output.key)
        return not self.awaits(output.key) or (output.key != self.key and output.first_index < self._next_index)

    def awaits(self, key: Key) -> bool:
        """May tokens still come under this key?"""
        moving = self.migration
        if moving is None:  # for each token: no key is made
            return key.epoch == self.epoch and key.request_id == self.request.request_id
        return key in (self.key, moving.before, moving.after)

    # --- tokens --------------------------------------------------------------------------------------------

    def follow(self, leader: LiveRequest) -> None:
        self.leader, self.is_sibling = leader, True
        leader.followers.append(self)

    def leave(self) -> None:
        """From now on it is placed alone."""
        if self.leader is not None:
            self.leader.followers.remove(self)
            self.leader = None

    @property
    def placed_together(self) -> tuple[LiveRequest, ...]:
        """All that a new placement of this one takes along."""
        return (self, *self.followers) if not self.tokens else (self,)

    def placed_request(self, now: float) -> Request:
        """The request as workers get it: with the tokens that the client has, and the time that is left."""
        service = replace(self.request.service, ttft_s=max(0.0, self.first_due - now))
        timeout_s = max(0.0, self.deadline - now)
        return replace(
            self.request, epoch=self.epoch, generated_ids=tuple(self.tokens), timeout_s=timeout_s, service=service
        )

    @property
    def decodes_on(self) -> Name | None:
        """Where it generates, or will."""
        if self.placement is None:
            return None
        return (self.placement.decode or self.placement.first).name

    @property
    def first_worker(self) -> Name | None:
        """The worker that the next token comes from as the first of its placement."""
        if self.placement is None or self.handed_off or self.is_finished:
            return None
        return self.placement.first.name

    @property
    def workers(self) -> tuple[Name, ...]:
        """Those whose death would stop the request. One that has all its tokens takes nothing of them any more, whoever
        still waits for its siblings."""
        if self.is_finished:
            return ()
        decode = self.placement.decode if self.placement is not None else None
        leaving = self.migration.source if self.migration is not None else None
        coming = self.migration.target if self.migration is not None and self._in_doubt else None
        members = [member for member in (decode, leaving, coming) if member is not None]
        names = [member.name for member in members]
        first = self.first_worker
        return tuple(dict.fromkeys([first, *names] if first is not None else names))

    @property
    def is_prefilling(self) -> bool:
        """Has this placement not yet given a token?"""
        return self._next_index == self._first_index

    def take(self, output: TokenOutput, worker_id: str) -> bool:
        """An output from a worker's stream. Did it move the request on?"""
        if not self.awaits(output.key):
            return False
        if output.key.epoch < self.epoch and (output.error is not None or output.finish is FinishReason.ABORT):
            return False  # of where it moved away from
        if output.error is not None:
            self.fail(error_from_code(output.error.code, output.error.message))
        elif output.finish is FinishReason.ABORT:
            self.fail(WorkerLost(f"worker {worker_id} let the request go"))
        elif output.first_index == self._next_index:
            self._deliver(output, worker_id)
            return True
        elif output.first_index > self._next_index:
            self._hold(output)
        return False

    def fail(self, error: SteelyardError) -> None:
        """The placement has failed. Of one that follows, its leader hears it, too, and does what is to be done."""
        if self.leader is None or not self.leader.is_prefilling:
            self._events.put_nowait(error)

    def expire(self) -> None:
        """The deadline has passed: whoever waits for the next event gets to know."""
        self.has_expired = True
        self._events.put_nowait(DeadlineExceeded(f"the deadline passed after {len(self.tokens)} tokens"))

    def note(self, stage: str, duration_s: float) -> None:
        self.stages += ((stage, duration_s),)

    def cancel(self) -> None:
        """Nobody wants more of it: its next output, the last one, says so. What waits is dropped, what still comes is
        stale, and who is just placing it again stops."""
        self.is_cancelled = True
        self.placement = self.migration = None
        self._raise_epoch()
        self._events.clear()
        self._held = []
        self._next_index = len(self.tokens)
        self.changed(self)
        self._events.put_nowait(TokenOutput(self.key, self._next_index, (), FinishReason.ABORT))
        if self.patience is not None and not self.patience.expired():
            self.patience.reschedule(-math.inf)

    async def next_event(self) -> TokenOutput | SteelyardError:
        """The next output in order, or why the placement failed. The caller bounds the wait."""
        event = await self._events.get()
        if not isinstance(event, TokenOutput):
            return event
        self.tokens.extend(event.token_ids)
        if not self.stages:
            return event
        stages, self.stages = self.stages, ()
        return replace(event, stages=stages + event.stages)

    def _deliver(self, output: TokenOutput, worker_id: str) -> None:
        decode = self.placement.decode if self.placement else None
        is_from_decode = decode is not None and decode.worker_id == worker_id
        if self.is_prefilling or self.migration is not None or (is_from_decode and not self.handed_off):
            self._go_on(output, is_from_decode)
        else:  # nearly every token
            self._count(output)
            if self.is_finished:
                self.changed(self)
        if self.cached_tokens is not None and output.cached_tokens != self.cached_tokens:
            output.cached_tokens = self.cached_tokens
        self._hand_on(output)
        if not self._held:
            return
        decode = self.placement.decode if self.placement else None  # it may have moved
        held, self._held = self._held, []
        for following in held:
            self.take(following, decode.worker_id if decode else worker_id)

    def _go_on(self, output: TokenOutput, is_from_decode: bool) -> None:
        """With an output that may begin its next phase, or a new place."""
        self.leave()
        before = (self.handed_off, self.is_prefilling, self.migration)
        if self.migration is not None and output.key == self.migration.after:
            self._arrive(self.migration)
            self.migration = None  # all that came before is here
        if self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        self.handed_off = self.handed_off or is_from_decode
        self._count(output)
        if self.is_finished or before != (self.handed_off, self.is_prefilling, self.migration):
            self.changed(self)

    def _count(self, output: TokenOutput) -> None:
        self._next_index += len(output.token_ids)
        self.is_finished = output.finish is not None

    def _hand_on(self, output: TokenOutput) -> None:
        """Past a reader that waits, if the tap takes it; what is to be told with it, and the end, are the reader's."""
        tap, may_pass = self.tap, output.finish is None and not self.stages
        if tap is not None and may_pass and self._events.is_awaited and tap(output):
            self.tokens.extend(output.token_ids)
        else:
            self._events.put_nowait(output)

    def _hold(self, output: TokenOutput) -> None:
        last = self._held[-1] if self._held else None
        if last is None or output.first_index == last.first_index + len(last.token_ids):
            self._held.append(output)
