"""What must hold at any moment, whatever went wrong: pure checks over the tables of a simulated cluster.

Each takes tables and yields what is wrong with them, in words; nothing is a good sign. This is the one place that reads
others' private tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from cluster.simulator.world import SimulatedWorker
from engine.block_manager import BlockManager, Holder, HolderKind
from engine.engine import Engine
from engine.sequence import Sequence
from engine.types import Key, TokenOutput
from router.dispatch import Dispatcher


@dataclass(frozen=True, slots=True)
class Violation:
    """`invariant` is its name below, or what else a run may never do."""

    invariant: str
    message: str
    at_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at_s:.6f} s: {self.message}"


# --- of one engine, after each of its turns -----------------------------------------------------------------------


def block_faults(engine: Engine) -> Iterator[str]:
    """Each block is free, cached or held, once; its holders are those whose tables have it, and each of them lives."""
    blocks, tables = engine.blocks, engine._live_tables()
    owners: list[list[Holder]] = [[] for _ in range(blocks.num_blocks)]
    for holder, block_ids in tables.items():
        for block_id in block_ids:
            owners[block_id].append(holder)
    resting = [0] * blocks.num_blocks
    for block_id in (*blocks._free, *blocks._cached):
        resting[block_id] += 1
    for block_id in range(blocks.num_blocks):
        holders = [*blocks.holders(block_id)]
        if resting[block_id] + bool(holders) != 1:
            yield f"block {block_id} is {resting[block_id]} times free or cached and has the holders {_names(holders)}"
        if holders != owners[block_id] and sorted(holders) != sorted(owners[block_id]):
            named, found = _names(holders), _names(owners[block_id])
            yield f"block {block_id} has the holders {named} and is in the tables of {found}"
    yield from _name_faults(blocks)


def _name_faults(blocks: BlockManager) -> Iterator[str]:
    """A name and its block know each other; what is free has none, what is cached has one."""
    for name, block_id in blocks._block_of.items():
        if blocks._hash_of[block_id] != name:
            yield f"block {block_id} is found by a name that is not its own"
    for block_id in blocks._free:
        if blocks._hash_of[block_id] is not None:
            yield f"block {block_id} is free and has a name"
    for block_id in blocks._cached:
        if blocks._hash_of[block_id] is None:
            yield f"block {block_id} is cached and has no name"


def sharing_faults(engine: Engine) -> Iterator[str]:
    """Several hold a block only where it is full and stores the same tokens for each; who writes a block is alone. To a
    reservation's blocks somebody writes, but to those that were there before it."""
    size = engine.spec.limits.block_size
    sequences = [one for one in (*engine.scheduler.running, *engine.scheduler.waiting) if one.tables]
    stores: dict[int, tuple[int, list[int]]] = {}  # block: (where it ends, the tokens up to there)
    for sequence in sequences:
        for table in sequence.tables:
            for index, block_id in enumerate(table.ids, start=table.first):
                if len(engine.blocks.holders(block_id)) > 1:
                    stop = (index + 1) * size
                    mine = (stop, sequence.tokens[:stop])
                    if stores.setdefault(block_id, mine) != mine:
                        yield f"block {block_id} is shared by {sequence.key} and another with other tokens"
        yield from _next_write_faults(engine, sequence, sequence.computed // size)
    for holder, held in engine._held.items():
        if holder.kind is HolderKind.RESERVATION:
            present = [*chain.from_iterable(held.present)]
            for number, block_id in enumerate(held.block_ids):
                if number in present and engine.blocks._hash_of[block_id] is None:
                    yield f"block {block_id} was there for {holder.key} and has no name"
                if number not in present and not engine.blocks.is_writable(block_id):
                    yield f"block {block_id} is reserved for {holder.key} and not its alone"


def _next_write_faults(engine: Engine, sequence: Sequence, index: int) -> Iterator[str]:
    for table in sequence.tables:
        if table.first <= index < table.stop and not engine.blocks.is_writable(table[index]):
            holders = engine.blocks.holders(table[index])
            yield f"block {table[index]} is written next by {sequence.key}, and held by {_names(holders)}"


# --- of one worker, whenever nothing more happens at a time -------------------------------------------------------


def reading_faults(worker: SimulatedWorker) -> Iterator[str]:
    """What can be read under a lease is still held for it."""
    held, scheduler = worker.engine._held, worker.engine.scheduler
    standing = {to: worker.engine.moves.frozen.get(key) for key, to in worker.sides._mover._moves.items()}
    for key, entry in worker.sides.outbox._entries.items():
        handoff = held.get(Holder(HolderKind.HANDOFF, key))
        if handoff is not None:
            mine = handoff.block_ids
        elif (sequence := standing.get(key)) is not None:
            mine = tuple(sequence.block_ids)
        else:
            mine = next((one.block_ids for one in (*scheduler.running, *scheduler.waiting) if one.key == key), ())
        if gone := [block_id for block_id in entry.block_ids if block_id not in mine]:
            yield f"blocks {gone} of {key} can be read under its lease, and are not held for it"


def writing_faults(worker: SimulatedWorker) -> Iterator[str]:
    """What a pull writes to is reserved for it."""
    for key, arrival in worker.sides._intake._arrivals.items():
        is_pulling = arrival.task is not None and arrival.committed is None and not arrival.task.done()
        if is_pulling and Holder(HolderKind.RESERVATION, key) not in worker.engine._held:
            yield f"{key} is pulled into blocks that are not reserved for it"


def lease_faults(worker: SimulatedWorker, now_s: float, patience_s: float) -> Iterator[str]:
    """A lease whose owner is silent ends. `now_s` is of the worker's clock."""
    for key, entry in worker.sides.outbox._entries.items():
        if entry.expires_at + patience_s < now_s:
            yield f"the lease on {key} should have ended {now_s - entry.expires_at:.3f} s ago"


def life_faults(worker: SimulatedWorker) -> Iterator[str]:
    """A worker that nobody killed serves on."""
    if worker.serving.done():
        error = None if worker.serving.cancelled() else worker.serving.exception()
        yield f"a worker ended by itself: {error!r}"


# --- of the gateway, likewise -------------------------------------------------------------------------------------


def epoch_faults(dispatcher: Dispatcher, before: dict[str, int]) -> Iterator[str]:
    """Epochs never go back, and nothing of another than the present one waits for a client. `before` is brought up to
    date."""
    for request_id, live in dispatcher._live.items():
        if live.epoch < before.get(request_id, 0):
            yield f"the epoch of {request_id} went back from {before[request_id]} to {live.epoch}"
        before[request_id] = live.epoch
        for event in live._events._events:
            if isinstance(event, TokenOutput) and not live.first_epoch <= event.key.epoch <= live.epoch:
                yield f"{event.key} waits for the client of {live.key}"


def deadline_faults(dispatcher: Dispatcher, now_s: float, patience_s: float) -> Iterator[str]:
    """`now_s` is of the gateway's clock."""
    for request_id, live in dispatcher._live.items():
        if live.deadline + patience_s < now_s:
            yield f"{request_id} goes on {now_s - live.deadline:.3f} s after its deadline"


def work_for_nobody(worker: SimulatedWorker, dispatcher: Dispatcher) -> Iterator[Key]:
    """Sequences that an engine computes, or will, of which the gateway wants no answer."""
    for sequence in (*worker.engine.scheduler.running, *worker.engine.scheduler.waiting):
        keys = [answer.key for answer in sequence.answers]
        wanted = (dispatcher._live.get(key.request_id) for key in keys)
        if not any(live is not None and any(map(live.awaits, keys)) for live in wanted):
            yield sequence.key


def leftovers(worker: SimulatedWorker) -> Iterator[str]:
    """At the end: what a worker still holds, in words."""
    if not worker.is_quiet():
        status, tables = worker.sides.status(), worker.engine._live_tables()
        held = ", ".join(f"{len(ids)} blocks by {holder.kind} {holder.key}" for holder, ids in tables.items() if ids)
        yield (
            f"{status.endpoint.incarnation} is not quiet: {held or 'no blocks held'}, {status.num_queued} queued, "
            f"{status.num_leases} leases, {status.num_pulls} pulls, {status.num_streams} streams"
        )
    if num_leaked := worker.engine.stats().num_leaked_blocks:
        yield f"{num_leaked} blocks of {worker.sides.member.worker_id} are leaked"


def gateway_leftovers(dispatcher: Dispatcher) -> Iterator[str]:
    if dispatcher._live:
        yield f"the gateway still has the requests {', '.join(dispatcher._live)}"
    if dispatcher._strays:
        yield f"the gateway still aborts {dispatcher._strays}"


def _names(holders: tuple[Holder, ...] | list[Holder]) -> str:
    return ", ".join(f"{holder.kind} {holder.key.request_id}/{holder.key.epoch}" for holder in holders) or "nobody"
