"""Blocks that leave layer by layer: each record once, as it is when it has been told of, by whatever way it is read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.runs import Runs, runs_of
from kv_transfer.frames import Commit, Message, PlacedFrame, cut_frames
from tests.kv_transfer.fakes import (
    FRAME_BYTES,
    KEY,
    LAYOUT,
    Link,
    Transfer,
    cut,
    deliver,
    handoff_of,
    once,
    transfer,
)
from tests.virtual import in_virtual_time, settle

NUM_LAYERS = LAYOUT.num_slots
BLOCK = LAYOUT.block_size


@dataclass(eq=False)
class PlaceLink(Link):
    """A Link over which only places come; the frames are copied out of the source pool, as over shared memory."""

    async def pull(self, lease, first_frame: int, present: Runs = ()) -> AsyncGenerator[Message]:
        self.pulls.append(first_frame)
        async with aclosing(self.outbox.places(lease, first_frame, present)) as messages:
            async for message in messages:
                await asyncio.sleep(0)
                self.num_messages += 1
                self.fault(self.num_messages - 1, b"")
                for one in message if isinstance(message, tuple) else ():
                    yield PlacedFrame(one, self.outbox._pool)  # pyright: ignore[reportArgumentType]
                if isinstance(message, Commit):
                    yield message


LINKS = {"frames": Link, "places": PlaceLink}
each_link = pytest.mark.parametrize("kind", LINKS)


@contextmanager
def unwritten(num_tokens: int, frame_bytes: int, seed: int, kind: str = "frames", fault=deliver) -> Iterator[Producing]:
    """A transfer whose source holds junk where nothing was computed."""
    with transfer(num_tokens, frame_bytes, seed=seed) as case:
        case.link = LINKS[kind](case.outbox, fault)
        final = bytes(case.source.memory)
        case.source.memory[:] = random.Random(seed + 1).randbytes(len(final))
        yield Producing(case, final)


@dataclass(eq=False)
class Producing:
    """What an engine does to the source pool: a layer's records are written just before they are told of."""

    case: Transfer
    final: bytes
    computed: int = 0

    def step(self, stop: int, marks: list[int]) -> Iterator[None]:
        """The positions up to here, told after these numbers of layers and at the end."""
        num_ready = len(self.case.source_ids) if stop == self.case.num_tokens else stop // BLOCK
        ready = self.case.source_ids[:num_ready]
        for layer in range(NUM_LAYERS):
            for block in ready[self.computed // BLOCK :]:
                self._write(layer, block)
            if layer + 1 in marks:
                self.case.outbox.progress(KEY, ready, layer + 1)
                yield
        self.computed = stop
        if stop < self.case.num_tokens:
            self.case.outbox.progress(KEY, ready)
        else:
            handoff = replace(handoff_of(stop), overlap_s=self.case.outbox.overlap_s(KEY))
            self.case.outbox.commit(KEY, ready, handoff.encode())
        yield

    def _write(self, layer: int, block: int) -> None:
        for plane, kind in enumerate(LAYOUT.planes):
            at = LAYOUT.block_offset(plane, layer, block, self.case.source.num_blocks)
            self.case.source.memory[at : at + kind.bytes_per_block] = self.final[at : at + kind.bytes_per_block]


STEPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, NUM_LAYERS), unique=True)), max_size=6)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 60), st.integers(100, 3000), STEPS, st.lists(st.integers(0, 14), unique=True).map(sorted),
    st.integers(0, 12), st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from([*LINKS]),
    st.integers(0, 99),
)  # fmt: skip
@in_virtual_time
async def test_each_byte_is_written_once_and_equal(
    num_tokens: int, frame_bytes: int, steps: list[tuple[int, list[int]]], numbers: list[int], pull_at: int,
    turns: list[int], kind: str, seed: int,
) -> None:  # fmt: skip
    """Whatever layers are told, whatever is there already, whenever the pull begins, however it keeps up."""
    with unwritten(num_tokens, frame_bytes, seed, kind) as producing:
        case, present = producing.case, runs_of(number for number in numbers if number < num_tokens // BLOCK)
        is_present = {number for run in present for number in run}
        pull, now = None, 0
        for size, marks in [*steps, (num_tokens, [NUM_LAYERS])]:
            stop = min(producing.computed + size, num_tokens)
            for _ in producing.step(stop, marks) if producing.computed < num_tokens else ():
                if now == pull_at:
                    pull = asyncio.ensure_future(case.run(present=present))
                await settle(turns[now % len(turns)])
                now += 1
        pulled = await (pull or case.run(present=present))
        assert pulled.num_resumes == 0, "a record that came twice would have cost one"
        assert pulled.size_bytes + pulled.saved_bytes == len(case.target_ids) * LAYOUT.bytes_per_block
        assert case.arrived() == [number not in is_present for number in range(len(case.target_ids))]
        assert case.others_untouched()
        specs = case.outbox._entries[KEY].frames
        records = [
            (spec.plane, layer, block) for spec in specs for layer in spec.layers for block in spec.blocks
        ]  # fmt: skip
        assert len(records) == len({*records})


@each_link
@in_virtual_time
async def test_first_layers_arrive_while_the_only_step_computes_later_ones(kind: str) -> None:
    with unwritten(num_tokens=18, frame_bytes=FRAME_BYTES, seed=0, kind=kind) as producing:
        case = producing.case
        pull = asyncio.ensure_future(case.run())
        step = producing.step(18, [1, 2])
        for num_layers in (1, 2):
            next(step)
            await settle(100)
            assert arrived_layers(case) == num_layers
        next(step)
        await pull
        assert all(case.arrived())


def arrived_layers(case: Transfer) -> int:
    """Of all blocks, in both planes: how many of the first layers are there."""
    for layer in range(NUM_LAYERS):
        for plane in range(len(LAYOUT.planes)):
            layers = range(layer, layer + 1)
            if case.source.read(plane, layers, case.source_ids) != case.target.read(plane, layers, case.target_ids):
                return layer
    return NUM_LAYERS


@each_link
@pytest.mark.parametrize("at", range(6))
@in_virtual_time
async def test_a_stream_that_is_cut_in_the_middle_of_a_step_goes_on_there(kind: str, at: int) -> None:
    with unwritten(18, FRAME_BYTES, 0, kind, once(at, cut)) as producing:
        pull = asyncio.ensure_future(producing.case.run())
        for stop, marks in ((9, [1, 2]), (18, [1, 3])):
            for _ in producing.step(stop, marks):
                await settle(30)
        assert (await pull).num_resumes == 1
        assert all(producing.case.arrived())


@each_link
@in_virtual_time
async def test_a_step_that_never_ends_gives_no_commit(kind: str) -> None:
    """Its engine has died: what came of it is not used."""
    with unwritten(18, FRAME_BYTES, 0, kind) as producing:
        case = producing.case
        pull = asyncio.ensure_future(case.run(timeout_s=100.0))
        next(producing.step(18, [NUM_LAYERS]))
        await settle(100)
        assert all(case.arrived())
        case.outbox.close(KEY)
        await settle(100)
        assert pull.done() and pull.exception() is not None


@in_virtual_time
async def test_what_had_arrived_when_the_first_token_was_sampled_is_hidden() -> None:
    with unwritten(num_tokens=18, frame_bytes=FRAME_BYTES, seed=0) as producing:
        case = producing.case
        pull = asyncio.ensure_future(case.run(timeout_s=10.0))
        step = producing.step(18, [1])
        await asyncio.sleep(5)
        next(step)
        await asyncio.sleep(2)
        next(step)
        await asyncio.sleep(0.5)
        pulled = await pull
        assert pulled.hidden_bytes == pulled.size_bytes // NUM_LAYERS
        assert (pulled.transfer_s, pulled.exposed_s) == pytest.approx((2.0, 0.0), abs=0.01)


@in_virtual_time
async def test_of_a_pull_that_begins_late_nothing_is_hidden() -> None:
    with unwritten(18, FRAME_BYTES, 0) as producing:
        for _ in producing.step(18, [1]):
            await asyncio.sleep(1)
        pulled = await producing.case.run()
        assert (pulled.hidden_bytes, pulled.transfer_s - pulled.exposed_s) == (0, 0.0)


@given(st.integers(1, 40), st.integers(0, 20), st.integers(1, 9), st.data())
def test_frames_of_some_slots_cover_these_once(frame_records: int, start: int, count: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, NUM_LAYERS - 1))
    slots = (first, data.draw(st.integers(first + 1, NUM_LAYERS)))
    specs = cut_frames(LAYOUT, range(start, start + count), 128 * frame_records, range(*slots))
    assert all(len(spec.layers) * len(spec.blocks) <= frame_records for spec in specs)
    found = sorted((spec.plane, layer, block) for spec in specs for layer in spec.layers for block in spec.blocks)
    blocks = range(start, start + count)
    assert found == [(plane, layer, block) for plane in range(2) for layer in range(*slots) for block in blocks]
