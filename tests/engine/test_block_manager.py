"""The block manager: every block is free, cached or has named holders, whatever is done with it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.types import Key

NUM_BLOCKS = 12


WRITERS = [kind for kind in HolderKind if kind is not HolderKind.COPY]  # a copy's source is only read


def holder(name: str, kind: HolderKind = HolderKind.SEQUENCE) -> Holder:
    return Holder(kind, Key(name, 0))


def chain(name: str, count: int) -> list[bytes]:
    """Names of the blocks of one prefix, from the first."""
    return [f"{name}:{index}".encode() for index in range(count)]


def fill(blocks: BlockManager, name: str, count: int) -> list[int]:
    """Blocks of a chain, named and held under its name."""
    block_ids = blocks.allocate(holder(name), count)
    assert block_ids is not None
    for block_id, block_hash in zip(block_ids, chain(name, count), strict=True):
        blocks.name(block_id, block_hash)
    return block_ids


# --- any sequence of operations -------------------------------------------------------------------------------


@dataclass
class Table:
    """What the model knows of one holder: its blocks, in order of position."""

    owner: Holder
    prefix: str
    block_ids: list[int]
    num_named: int = 0


@dataclass
class Model:
    """What must be true, kept without looking into the block manager."""

    tables: list[Table] = field(default_factory=list)
    names: dict[bytes, int] = field(default_factory=dict)  # where we named a block first; may be evicted since
    next_holder: int = 0

    def new_holder(self, kind: HolderKind) -> Holder:
        self.next_holder += 1
        return holder(str(self.next_holder), kind)

    def held(self) -> dict[int, list[Holder]]:
        found: dict[int, list[Holder]] = {}
        for table in self.tables:
            for block_id in table.block_ids:
                found.setdefault(block_id, []).append(table.owner)
        return found


class BlockManagerMachine(RuleBasedStateMachine):
    """Sequences that come, find their prefix, grow, fork, are handed on and leave, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS)
        self.model = Model()

    # --- what may happen -----------------------------------------------------------------------------------

    @rule(prefix=st.sampled_from("ab"), count=st.integers(1, 5), kind=st.sampled_from(WRITERS))
    def start(self, prefix: str, count: int, kind: HolderKind) -> None:
        """A newcomer shares what is known of its prefix and allocates the rest, or leaves no trace."""
        owner = self.model.new_holder(kind)
        before = self.blocks.num_available
        found = self.blocks.match(chain(prefix, count))
        self.blocks.share(owner, found)
        fresh = self.blocks.allocate(owner, count - len(found))
        if fresh is None:
            self.blocks.free(owner, found)
            assert self.blocks.num_available == before
        else:
            assert len(fresh) == len(set(fresh)) == count - len(found)
            assert all(self.blocks.holders(block_id) == (owner,) for block_id in fresh)
            assert all(self.blocks.is_writable(block_id) for block_id in fresh)
            self._evicted(fresh)
            self.model.tables.append(Table(owner, prefix, [*found, *fresh], len(found)))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def name_next(self, data: st.DataObject) -> None:
        """The next block of a sequence is full: the first of its name gets it, any other stays unnamed."""
        table = data.draw(st.sampled_from(self.model.tables))
        if table.num_named == len(table.block_ids):
            return
        block_id = table.block_ids[table.num_named]
        block_hash = chain(table.prefix, table.num_named + 1)[-1]
        self.blocks.name(block_id, block_hash)
        self.model.names.setdefault(block_hash, block_id)
        table.num_named += 1
        writable = self.model.names[block_hash] != block_id and len(self.model.held()[block_id]) == 1
        assert self.blocks.is_writable(block_id) == writable

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data(), kind=st.sampled_from(WRITERS))
    def fork(self, data: st.DataObject, kind: HolderKind) -> None:
        """Somebody else holds the same blocks too: nobody may write them any more."""
        table = data.draw(st.sampled_from(self.model.tables))
        owner = self.model.new_holder(kind)
        self.blocks.share(owner, table.block_ids)
        self.model.tables.append(Table(owner, table.prefix, list(table.block_ids), table.num_named))
        assert not any(self.blocks.is_writable(block_id) for block_id in table.block_ids)

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        """Before writing its last block a sequence swaps it for a private one, unless it is private already."""
        table = data.draw(st.sampled_from(self.model.tables))
        last = table.block_ids[-1]
        if self.blocks.is_writable(last):
            assert self.blocks.holders(last) == (table.owner,)
            return
        fresh = self.blocks.allocate(table.owner, 1)
        if fresh is None:
            return
        self._evicted(fresh)
        self.blocks.free(table.owner, [last])
        table.block_ids[-1] = fresh[0]
        table.num_named = min(table.num_named, len(table.block_ids) - 1)
        assert self.blocks.is_writable(fresh[0])

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data(), kind=st.sampled_from(WRITERS))
    def pass_on(self, data: st.DataObject, kind: HolderKind) -> None:
        table = data.draw(st.sampled_from(self.model.tables))
        before, table.owner = table.owner, self.model.new_holder(kind)
        self.blocks.pass_on(before, table.owner, table.block_ids)

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.model.tables))
        self.model.tables.remove(table)
        self.blocks.free(table.owner, table.block_ids)

    @rule(count=st.integers(NUM_BLOCKS + 1, 2 * NUM_BLOCKS))
    def ask_for_too_much(self, count: int) -> None:
        assert self.blocks.allocate(holder("greedy"), count) is None

    # --- what must hold after each -------------------------------------------------------------------------

    @invariant()
    def every_block_is_free_cached_or_held(self) -> None:
        held = self.model.held()
        for block_id in range(NUM_BLOCKS):
            assert sorted(self.blocks.holders(block_id)) == sorted(held.get(block_id, []))
        assert self.blocks.num_available == NUM_BLOCKS - len(held)
        assert 0 <= self.blocks.num_cached <= self.blocks.num_available

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.blocks.num_leaked({table.owner: table.block_ids for table in self.model.tables}) == 0

    @invariant()
    def what_matches_is_where_it_was_named(self) -> None:
        """So an evicted block, which has lost its name, is never found."""
        cached = set()
        for prefix in "ab":
            hashes = chain(prefix, 6)
            found = self.blocks.match(hashes)
            assert found == [self.model.names.get(block_hash) for block_hash in hashes[: len(found)]]
            cached |= set(found) - set(self.model.held())
        assert len(cached) <= self.blocks.num_cached

    @invariant()
    def a_held_block_keeps_its_name(self) -> None:
        held = self.model.held()
        for prefix in "ab":
            names = chain(prefix, 6)
            run = next((n for n, name in enumerate(names) if self.model.names.get(name) not in held), len(names))
            assert len(self.blocks.match(names)) >= run

    def teardown(self) -> None:
        for table in self.model.tables:
            self.blocks.free(table.owner, table.block_ids)
        assert self.blocks.num_available == NUM_BLOCKS
        assert self.blocks.num_leaked({}) == 0

    def _evicted(self, block_ids: list[int]) -> None:
        """These ids were given out anew: whatever they were named before is gone."""
        for name in [name for name, block_id in self.model.names.items() if block_id in block_ids]:
            del self.model.names[name]


TestAnySequenceOfOperations = BlockManagerMachine.TestCase
TestAnySequenceOfOperations.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# --- eviction -------------------------------------------------------------------------------------------------


def test_tails_are_evicted_before_heads() -> None:
    blocks = BlockManager(4)
    block_ids = fill(blocks, "a", 4)
    blocks.free(holder("a"), block_ids)
    for count in (3, 2, 1, 0):
        assert blocks.allocate(holder("b"), 1) == [block_ids[count]]
        assert blocks.match(chain("a", 4)) == block_ids[:count]


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    blocks = BlockManager(6)
    chains = {name: fill(blocks, name, 2) for name in "abc"}
    for name, block_ids in chains.items():
        blocks.free(holder(name), block_ids)
    blocks.share(holder("user"), chains["a"])  # used again: now b is the oldest
    blocks.free(holder("user"), chains["a"])
    assert blocks.allocate(holder("new"), 3) == [*reversed(chains["b"]), chains["c"][1]]
    assert blocks.match(chain("b", 2)) == []
    assert blocks.match(chain("c", 2)) == chains["c"][:1]
    assert blocks.match(chain("a", 2)) == chains["a"]


def test_free_blocks_are_taken_before_anything_is_evicted() -> None:
    blocks = BlockManager(4)
    block_ids = fill(blocks, "a", 2)
    blocks.free(holder("a"), block_ids)
    assert not set(blocks.allocate(holder("b"), 2) or ()) & set(block_ids)
    assert blocks.match(chain("a", 2)) == block_ids


def test_a_held_block_is_never_evicted() -> None:
    blocks = BlockManager(4)
    block_ids = fill(blocks, "a", 3)
    assert blocks.allocate(holder("b"), 2) is None
    assert blocks.match(chain("a", 3)) == block_ids


def test_a_refused_allocation_evicts_nothing() -> None:
    blocks = BlockManager(4)
    block_ids = fill(blocks, "a", 2)
    blocks.free(holder("a"), block_ids)
    assert blocks.allocate(holder("b"), 5) is None
    assert blocks.match(chain("a", 2)) == block_ids


def test_an_unknown_name_ends_a_match() -> None:
    blocks = BlockManager(4)
    block_ids = fill(blocks, "a", 3)
    assert blocks.match(chain("a", 3)[1:]) == block_ids[1:]
    assert blocks.match([b"unknown", *chain("a", 3)]) == []


# --- names ----------------------------------------------------------------------------------------------------


def test_a_second_block_of_the_same_name_stays_unnamed() -> None:
    blocks = BlockManager(4)
    first = fill(blocks, "a", 1)
    second = blocks.allocate(holder("twin"), 1)
    assert second is not None
    blocks.name(second[0], chain("a", 1)[0])
    assert blocks.match(chain("a", 1)) == first
    assert blocks.is_writable(second[0])
    blocks.free(holder("twin"), second)
    assert blocks.num_cached == 0


def test_a_block_keeps_its_first_name() -> None:
    blocks = BlockManager(4)
    first = fill(blocks, "a", 1)
    blocks.name(first[0], b"another")
    assert blocks.match([b"another"]) == []
    assert blocks.match(chain("a", 1)) == first


def test_a_name_is_free_again_once_its_block_is_evicted() -> None:
    blocks = BlockManager(1)
    blocks.free(holder("a"), fill(blocks, "a", 1))
    blocks.free(holder("b"), fill(blocks, "b", 1))  # evicts a
    assert blocks.match(chain("a", 1)) == []
    assert fill(blocks, "a", 1) == blocks.match(chain("a", 1))


def test_a_block_without_holder_cannot_be_named_and_a_free_one_not_shared() -> None:
    blocks = BlockManager(2)
    with pytest.raises(AssertionError, match="holder"):
        blocks.name(0, b"name")
    with pytest.raises(AssertionError, match="free"):
        blocks.share(holder("a"), [0])


# --- leaks ----------------------------------------------------------------------------------------------------


def test_a_block_whose_holder_is_in_no_table_is_a_leak() -> None:
    blocks = BlockManager(8)
    live = {holder("a"): fill(blocks, "a", 2)}
    assert blocks.num_leaked(live) == 0
    lost = blocks.allocate(holder("forgotten"), 3)
    assert blocks.num_leaked(live) == 3
    blocks.free(holder("forgotten"), lost or [])
    assert blocks.num_leaked(live) == 0


def test_a_block_that_its_holder_s_table_lacks_is_a_leak() -> None:
    blocks = BlockManager(8)
    block_ids = fill(blocks, "a", 3)
    assert blocks.num_leaked({holder("a"): block_ids[:2]}) == 1
    assert blocks.num_leaked({holder("a", HolderKind.HANDOFF): block_ids}) == 3


def test_a_shared_block_leaks_if_one_of_its_holders_forgot_it() -> None:
    blocks = BlockManager(8)
    block_ids = fill(blocks, "a", 2)
    blocks.share(holder("b"), block_ids)
    assert blocks.num_leaked({holder("a"): block_ids, holder("b"): block_ids}) == 0
    assert blocks.num_leaked({holder("a"): block_ids}) == 2


def test_a_block_that_is_in_no_list_is_a_leak() -> None:
    blocks = BlockManager(8)
    blocks._free.remove(5)  # a fault planted where no public door leads
    assert blocks.num_leaked({}) == 1
    blocks.free(holder("a"), fill(blocks, "a", 2))
    del blocks._cached[next(iter(blocks._cached))]
    assert blocks.num_leaked({}) == 2


def test_ten_thousand_random_lives_leave_nothing_behind() -> None:
    numbers, blocks = random.Random(1), BlockManager(50)
    live: dict[Holder, list[int]] = {}
    for count in range(10_000):
        owner = holder(str(count))
        block_ids = blocks.allocate(owner, numbers.randrange(8))
        if block_ids is not None:
            live[owner] = block_ids
        if block_ids is None or numbers.random() < 0.5:
            leaver = numbers.choice(list(live))
            blocks.free(leaver, live.pop(leaver))
    assert blocks.num_leaked(live) == 0
    assert blocks.num_available == 50 - sum(map(len, live.values()))
