"""The scheduler under an engine whose model is a hash: budget, fairness, preemption, prefix hits, drafts, accounting.

A HashRunner's tokens depend on every token before them, and on nothing else; what it "stores" for a position is a
digest of the tokens up to there, kept in the slot that the scheduler gave it, and checked at every step. So a block
that was lost, overwritten or shared wrongly shows as a wrong slot or as wrong tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.engine import Engine, EngineSpec
from engine.scheduler import Batch, Scheduled, SchedulerLimits
from engine.types import (
    Abort,
    Add,
    Adopt,
    Command,
    FinishReason,
    Key,
    Release,
    Request,
    Reserve,
    Reserved,
    Sampled,
    SamplingParams,
    StepOutputs,
    TokenOutput,
)

VOCAB = 1000
MAX_STEPS = 5000


def digests(token_ids: Items[int]) -> list[int]:
    """What is stored for each position: it depends on all tokens up to there."""
    found, state = [], 0
    for token_id in token_ids:
        state = hash((state, token_id))
        found.append(state)
    return found


def next_tokens(token_ids: Items[int], count: int) -> list[int]:
    """The `count` tokens that the hash model says after these."""
    tokens = list(token_ids)
    for _ in range(count):
        tokens.append(digests(tokens)[-1] % VOCAB)
    return tokens[len(token_ids) :]


class HashRunner:
    """A model runner without tensors. With `num_drafts` it accepts 0 to num_drafts + 1 tokens a step."""

    def __init__(self, blocks: BlockManager, block_size: int, num_drafts: int = 0, seed: int = 0) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.num_drafts = num_drafts
        self.slots: dict[tuple[int, int], int] = {}
        self._random = random.Random(seed)

    def execute(self, batch: Batch) -> list[Sampled]:
        self._copy(batch.copies)
        emitted = [self._emit(item) for item in batch.scheduled]
        written: set[tuple[int, int]] = set()
        for item, token_ids in zip(batch.scheduled, emitted, strict=True):
            written |= self._store(item, token_ids, written)
        for item in batch.scheduled:
            stop = item.start + item.num_new
            assert self.read(item.sequence.block_ids, stop) == digests(item.sequence.tokens[:stop]), "a slot is wrong"
        return [Sampled(token_ids) for token_ids in emitted]

    def read(self, block_ids: Items[int], num_tokens: int) -> list[int | None]:
        return [self.slots.get(self._slot(block_ids, position)) for position in range(num_tokens)]

    def write(self, block_ids: Items[int], token_ids: Items[int]) -> None:
        """Store all positions of these tokens, as a transfer does."""
        for position, digest in enumerate(digests(token_ids)):
            self.slots[self._slot(block_ids, position)] = digest

    def _emit(self, item: Scheduled) -> tuple[int, ...]:
        if not item.samples:
            return ()
        count = 1
        if self.num_drafts and item.sequence.is_decoding:
            room = len(item.sequence.block_ids) * self.block_size - item.start - item.num_new
            count = self._random.randint(0, min(self.num_drafts, room) + 1)
        return tuple(next_tokens(item.sequence.tokens, count))

    def _store(self, item: Scheduled, token_ids: Items[int], taken: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Write the item's positions, its accepted drafts, and rubbish where further drafts were refused."""
        block_ids = item.sequence.block_ids
        stop = item.start + item.num_new
        values = dict(enumerate(digests([*item.sequence.tokens[:stop], *token_ids[:-1]])))
        if self.num_drafts and item.sequence.is_decoding:
            end = min(stop + self.num_drafts, len(block_ids) * self.block_size)
            values = {position: -position for position in range(stop, end)} | values
        new = [position for position in values if position >= item.start]
        places = {self._slot(block_ids, position): values[position] for position in new}
        assert not places.keys() & taken, "two sequences write the same slot"
        assert all(self.blocks.is_writable(block_id) for block_id, _ in places), "a shared or named block is written"
        self.slots |= places
        return set(places)

    def _copy(self, copies: Items[tuple[int, int]]) -> None:
        offsets = range(self.block_size)
        read = {(target, o): self.slots.get((source, o)) for source, target in copies for o in offsets}
        self.slots |= {slot: value for slot, value in read.items() if value is not None}

    def _slot(self, block_ids: Items[int], position: int) -> tuple[int, int]:
        return block_ids[position // self.block_size], position % self.block_size


@dataclass
class Bench:
    """An engine and a HashRunner, turned by hand; every batch is checked against the limits."""

    num_blocks: int = 32
    lookahead: int = 0
    limits: SchedulerLimits = field(default_factory=lambda: SchedulerLimits(4, 16, 8, 8))
    seed: int = 0
    tokens: dict[Key, list[int]] = field(default_factory=dict)
    finished: dict[Key, FinishReason] = field(default_factory=dict)
    outputs: list[TokenOutput] = field(default_factory=list)
    reserved: dict[Key, Reserved] = field(default_factory=dict)
    batches: list[list[tuple[str, int, int]]] = field(default_factory=list)  # (request id, start, num_new)

    def __post_init__(self) -> None:
        self.limits = replace(self.limits, lookahead=self.lookahead)
        spec = EngineSpec(self.limits, self.num_blocks, 10_000, VOCAB, frozenset(), b"key")
        self.engine = Engine(spec)
        self.runner = HashRunner(self.engine.blocks, self.limits.block_size, self.lookahead, self.seed)

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.engine.handle(command)

    def step(self) -> Batch | None:
        scheduler = self.engine.scheduler
        decoding = [sequence for sequence in scheduler.running if sequence.is_decoding]
        preempted = scheduler.num_preemptions
        batch = self.engine.begin()
        self._collect(self.engine.take_outputs())
        if batch is None:
            return None
        self._check(batch)
        order = [item.sequence in decoding for item in batch.scheduled]
        if scheduler.num_preemptions == preempted:  # what was preempted may have come back at once, behind others
            assert order == sorted(order, reverse=True), "decodes come first"
        self.batches.append([(item.sequence.key.request_id, item.start, item.num_new) for item in batch.scheduled])
        self.engine.finish(batch, self.runner.execute(batch))
        self._collect(self.engine.take_outputs())
        return batch

    def run(self) -> None:
        """Until idle."""
        for _ in range(MAX_STEPS):
            if self.step() is None:
                return
        raise AssertionError("the engine does not come to an end")

    def reserve(self, request: Request, growth: int = 0) -> bool:
        """Reserve blocks for all but the request's last token."""
        self.send(Reserve(request.key, request.num_tokens - 1, growth))
        self._collect(self.engine.take_outputs())
        return self.reserved[request.key].block_ids is not None

    def adopt(self, request: Request) -> None:
        """Hand in a reserved request whose blocks a transfer has written."""
        block_ids = self.reserved[request.key].block_ids
        assert block_ids is not None
        known = [*request.prompt_ids, *request.generated_ids]
        self.runner.write(block_ids, known[:-1])
        self.send(Adopt(request, len(known) - 1))

    def check_idle(self) -> None:
        """Nothing runs, waits or is held; every block is free or cached."""
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_held) == (0, 0, 0)
        assert stats.num_free_blocks == self.num_blocks
        assert stats.num_leaked_blocks == 0

    def check_tokens(self, *requests: Request) -> None:
        """Each was finished by its length, with the tokens that it has when it runs alone."""
        for request in requests:
            known = [*request.prompt_ids, *request.generated_ids]
            count = request.sampling.max_tokens - len(request.generated_ids)
            assert self.finished[request.key] is FinishReason.LENGTH
            assert self.tokens[request.key] == next_tokens(known, count)

    def names(self, index: int = -1) -> list[str]:
        return [name for name, _, _ in self.batches[index]]

    def _check(self, batch: Batch) -> None:
        items = batch.scheduled
        assert 0 < batch.num_tokens <= self.limits.max_batch_tokens
        assert len(items) <= self.limits.max_batch_seqs
        assert len({item.sequence.key for item in items}) == len(items)
        assert all(0 < item.num_new <= self.limits.prefill_chunk for item in items)

    def _collect(self, outputs: StepOutputs) -> None:
        for output in outputs.tokens:
            self.outputs.append(output)
            self.tokens.setdefault(output.key, []).extend(output.token_ids)
            if output.finish:
                self.finished[output.key] = output.finish
        for answer in outputs.reserved:
            self.reserved[answer.key] = answer


def request(
    name: str, num_prompt: int, max_tokens: int = 4, generated: int = 0, prompt: Items[int] | None = None
) -> Request:
    """A request with a prompt of its own, or this one; `generated` of its tokens are known already."""
    ids = [hash((position, *name.encode())) % VOCAB for position in range(num_prompt)] if prompt is None else prompt
    return Request(
        name, tuple(ids), SamplingParams(max_tokens=max_tokens), generated_ids=tuple(next_tokens(ids, generated))
    )


def limits(block_size: int = 4, tokens: int = 16, seqs: int = 8, chunk: int = 8, prefix_cache: bool = True):
    return SchedulerLimits(block_size, tokens, seqs, chunk, prefix_cache)


# --- budget and order -----------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_and_samples_after_the_last() -> None:
    bench = Bench()
    long = request("long", 21, max_tokens=2)
    bench.send(Add(long))
    bench.run()
    assert bench.batches == [[("long", 0, 8)], [("long", 8, 8)], [("long", 16, 5)], [("long", 21, 1)]]
    bench.check_tokens(long)


def test_prompts_share_the_token_budget_oldest_first() -> None:
    bench = Bench(limits=limits(tokens=10))
    bench.send(*(Add(request(name, 12)) for name in "abc"))
    bench.step()
    bench.step()
    assert bench.batches == [[("a", 0, 8), ("b", 0, 2)], [("a", 8, 4), ("b", 2, 6)]]


def test_decodes_come_before_prompts() -> None:
    bench = Bench(limits=limits(tokens=10))
    bench.send(Add(request("old", 4, max_tokens=9)))
    bench.step()
    bench.send(Add(request("new", 20)))
    bench.step()
    assert bench.batches[-1] == [("old", 4, 1), ("new", 0, 8)]


def test_no_more_sequences_than_seats_run_at_a_time() -> None:
    bench = Bench(limits=limits(seqs=2))
    requests = [request(name, 3) for name in "abcde"]
    bench.send(*map(Add, requests))
    bench.run()
    assert max(map(len, bench.batches)) == 2
    bench.check_tokens(*requests)
    bench.check_idle()


def test_a_prompt_starts_only_when_all_its_blocks_fit() -> None:
    bench = Bench(num_blocks=8, limits=limits(prefix_cache=False))
    first, second = request("first", 20, max_tokens=4), request("second", 16, max_tokens=4)
    bench.send(Add(first), Add(second))
    while first.key not in bench.finished:
        bench.step()
        assert "second" not in bench.names()
    bench.run()
    bench.check_tokens(first, second)
    assert bench.engine.stats().num_preemptions == 0


def test_more_decodes_than_the_budget_take_turns_by_age() -> None:
    bench = Bench(limits=limits(tokens=3, seqs=8))
    requests = [request(name, 2, max_tokens=5) for name in "abcdef"]
    bench.send(*map(Add, requests))
    bench.run()
    assert list(bench.finished) == [item.key for item in requests]
    bench.check_tokens(*requests)


# --- nobody starves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 6, 16])
def test_a_long_prompt_finishes_while_short_ones_keep_coming(tokens: int) -> None:
    bench = Bench(num_blocks=64, limits=limits(tokens=tokens, chunk=4))
    long = request("long", 120, max_tokens=4)
    bench.send(Add(request("before", 3)), Add(long))
    for count in range(400):
        bench.send(Add(request(f"short{count}", 3)))
        bench.step()
        if long.key in bench.finished:
            return
    raise AssertionError("the long prompt starved")


def test_short_prompts_finish_while_long_ones_keep_coming() -> None:
    bench = Bench(num_blocks=64, limits=limits(tokens=8, chunk=4, seqs=3))
    short = request("short", 3)
    for count in range(3):
        bench.send(Add(request(f"before{count}", 60)))
    bench.send(Add(short))
    for count in range(400):
        bench.send(Add(request(f"long{count}", 60)))
        bench.step()
        if short.key in bench.finished:
            return
    raise AssertionError("the short prompt starved")


def test_a_prompt_finishes_while_adopted_sequences_keep_coming() -> None:
    bench = Bench(num_blocks=64, limits=limits(tokens=4, chunk=4, seqs=16))
    prompt = request("prompt", 40)
    bench.send(Add(prompt))
    for count in range(300):
        arrival = request(f"adopted{count}", 6, max_tokens=12, generated=1)
        if bench.reserve(arrival):
            bench.adopt(arrival)
        bench.step()
        if prompt.key in bench.finished:
            return
    raise AssertionError("the prompt starved")


@pytest.mark.parametrize("seqs", [4, 16])
def test_what_waits_for_blocks_or_seats_goes_before_new_reservations(seqs: int) -> None:
    bench = Bench(num_blocks=16, limits=limits(seqs=seqs, prefix_cache=False))
    waiting = request("waiting", 30)
    for count in range(300):
        arrival = request(f"adopted{count}", 8, max_tokens=6, generated=1)
        if bench.reserve(arrival):
            bench.adopt(arrival)
        if count == 10:
            bench.send(Add(waiting))
        bench.step()
        if waiting.key in bench.finished:
            return
    raise AssertionError("reservations overtook for ever")


# --- preemption -----------------------------------------------------------------------------------------------


def test_preemption_takes_the_youngest_and_never_the_oldest() -> None:
    bench = Bench(num_blocks=9)
    requests = [request(name, 8, max_tokens=20) for name in ("oldest", "middle", "young")]
    bench.send(*map(Add, requests))
    preempted: list[str] = []
    for _ in range(MAX_STEPS):
        before = [sequence.key.request_id for sequence in bench.engine.scheduler.running]
        if bench.step() is None:
            break
        waiting = [sequence.key.request_id for sequence in bench.engine.scheduler.waiting]
        lost = [name for name in before if name in waiting]
        assert lost == before[len(before) - len(lost) :], "the youngest go first"
        preempted += lost
    assert "oldest" not in preempted
    assert bench.engine.stats().num_preemptions == len(preempted) > 0
    bench.check_tokens(*requests)
    bench.check_idle()


def test_a_preempted_sequence_continues_where_it_was() -> None:
    """Its tokens are computed again, none is sent twice."""
    bench = Bench(num_blocks=6, limits=limits(prefix_cache=False))
    requests = [request(name, 8, max_tokens=12) for name in "ab"]
    bench.send(*map(Add, requests))
    bench.run()
    assert bench.engine.stats().num_preemptions >= 1
    bench.check_tokens(*requests)
    for item in requests:
        indices = [output.first_index for output in bench.outputs if output.key == item.key and output.token_ids]
        assert indices == list(range(12))


def test_short_prompts_pass_long_ones_and_the_oldest_goes_on_in_every_step() -> None:
    """Two long prompts would fill each step; the short ones behind them get their first token in the next step."""
    bench = Bench(num_blocks=100, limits=limits(tokens=16))
    bench.send(*(Add(request(name, 80)) for name in ("long1", "long2")))
    bench.step()
    assert bench.batches[-1] == [("long1", 0, 8), ("long2", 0, 8)]
    bench.send(*(Add(request(name, 4)) for name in "abc"))
    bench.step()
    assert bench.batches[-1] == [("long1", 8, 8), ("a", 0, 4), ("b", 0, 4)]
    bench.step()
    assert ("long1", 16, 8) in bench.batches[-1] and ("c", 0, 4) in bench.batches[-1]
    bench.run()
    bench.check_idle()


def test_if_nobody_may_be_overtaken_prompts_are_computed_in_the_order_of_their_coming() -> None:
    bench = Bench(num_blocks=100, limits=replace(limits(tokens=16), max_overtaken=0))
    bench.send(Add(request("long1", 20)), Add(request("long2", 20)), Add(request("a", 4)))
    bench.run()
    firsts = [name for batch in bench.batches for name, start, _ in batch if start == 0]
    assert firsts == ["long1", "long2", "a"]
    bench.check_idle()


def test_nobody_is_overtaken_for_ever() -> None:
    bench = Bench(num_blocks=12, limits=limits(tokens=16, seqs=3))
    bench.send(Add(request("busy", 8, max_tokens=12)), Add(request("long", 40, max_tokens=2)))
    names = (f"short{index}" for index in itertools.count())
    steps = 0
    while Key("long", 0) not in bench.finished:
        bench.send(Add(request(next(names), 4, max_tokens=1)), Add(request(next(names), 4, max_tokens=1)))
        bench.step()
        steps += 1
        assert steps < 2 * limits().max_overtaken, "it starves"
    assert steps > 10, "it was overtaken"


def test_a_preempted_sequence_goes_before_those_that_waited() -> None:
    bench = Bench(num_blocks=6, limits=limits(seqs=2, prefix_cache=False))
    bench.send(*(Add(request(name, 8, max_tokens=12)) for name in "abc"))
    while not bench.engine.stats().num_preemptions:
        bench.step()
    assert [sequence.key.request_id for sequence in bench.engine.scheduler.waiting] == ["b", "c"]
    bench.run()
    assert [key.request_id for key in bench.finished] == ["a", "b", "c"]


def test_the_last_one_running_preempts_itself_and_recovers() -> None:
    bench = Bench(num_blocks=6)
    alone = request("alone", 12, max_tokens=8)
    bench.send(Reserve(Key("lease", 0), 11), Add(alone))
    while bench.step():
        pass
    assert alone.key not in bench.finished
    assert bench.engine.stats().num_preemptions == 1
    bench.send(Release(Key("lease", 0)))
    bench.run()
    bench.check_tokens(alone)
    bench.check_idle()


def test_a_hand_off_is_never_preempted() -> None:
    bench = Bench(num_blocks=10, limits=limits(tokens=9, chunk=4))
    old, young = request("old", 4, max_tokens=20), request("young", 4, max_tokens=20)
    leaving = request("leaving", 24)
    bench.send(Add(old), Add(young), Add(leaving, handoff=True))
    while leaving.key not in bench.tokens:
        bench.step()
        assert leaving.key not in [sequence.key for sequence in bench.engine.scheduler.waiting]
    bench.run()
    bench.send(Release(leaving.key))
    bench.run()
    bench.check_tokens(old, young)
    assert bench.tokens[leaving.key] == next_tokens(leaving.prompt_ids, 1)
    bench.check_idle()


def test_an_aborted_sequence_makes_room_at_once() -> None:
    bench = Bench(num_blocks=8)
    first, second = request("first", 24, max_tokens=8), request("second", 24, max_tokens=8)
    bench.send(Add(first), Add(second))
    bench.step()
    bench.send(Abort(first.key))
    bench.run()
    assert bench.finished[first.key] is FinishReason.ABORT
    bench.check_tokens(second)
    bench.check_idle()


# --- prefix cache ---------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    bench = Bench()
    first = request("first", 14)
    bench.send(Add(first))
    bench.run()
    same_start = request("second", 0, prompt=[*first.prompt_ids[:10], 1, 2, 3])
    bench.send(Add(same_start))
    bench.batches.clear()
    bench.run()
    assert bench.batches[0] == [("second", 8, 5)]  # two whole blocks were known
    assert bench.outputs[-1].cached_tokens == 8
    bench.check_tokens(same_start)


def test_a_prompt_known_as_a_whole_copies_its_last_block_and_computes_one_token() -> None:
    bench = Bench()
    first = request("first", 12)
    twin = request("twin", 0, prompt=first.prompt_ids)
    bench.send(Add(first))
    bench.run()
    bench.send(Add(twin))
    batch = bench.step()
    assert batch is not None
    assert [(item.start, item.num_new, item.samples) for item in batch.scheduled] == [(11, 1, True)]
    ((source, target),) = batch.copies
    assert bench.engine.blocks.holders(source) == ()
    assert len(bench.engine.blocks.holders(target)) == 1
    bench.run()
    bench.check_tokens(first, twin)
    assert bench.outputs[-1].cached_tokens == 11
    bench.check_idle()


def test_a_whole_hit_keeps_its_last_block_until_the_step_has_copied_it() -> None:
    bench = Bench(num_blocks=7)
    first = request("first", 12, max_tokens=1)
    bench.send(Add(first))
    bench.run()
    twin = request("twin", 0, prompt=first.prompt_ids, max_tokens=1)
    other = request("other", 16, max_tokens=1)
    bench.send(Add(twin), Add(other))
    batch = bench.step()
    assert batch is not None and batch.copies
    assert len(batch.scheduled) == 1, "the copied block is the one that the other lacks"
    bench.run()
    bench.check_tokens(twin, other)
    bench.check_idle()


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    bench = Bench(num_blocks=8)
    old, young = request("old", 12, max_tokens=12), request("young", 12, max_tokens=12)
    bench.send(Add(old), Add(young))
    bench.run()
    restarts = [start for batch in bench.batches for name, start, num_new in batch if name == "young" and num_new > 1]
    assert bench.engine.stats().num_preemptions >= 1
    assert restarts[0] == 0 and max(restarts) >= 8, "a restart began past its cached blocks"
    bench.check_tokens(old, young)


def test_namespaces_do_not_share_prefixes() -> None:
    bench = Bench()
    first = request("first", 12)
    stranger = replace(request("second", 0, prompt=first.prompt_ids), namespace="another tenant")
    bench.send(Add(first))
    bench.run()
    bench.send(Add(stranger))
    bench.run()
    assert bench.outputs[-1].cached_tokens == 0
    bench.check_tokens(first, stranger)


def test_without_the_cache_nothing_is_shared_or_kept() -> None:
    bench = Bench(limits=limits(prefix_cache=False))
    first = request("first", 12)
    twin = request("twin", 0, prompt=first.prompt_ids)
    for item in (first, twin):
        bench.send(Add(item))
        bench.run()
        assert bench.engine.stats().num_cached_blocks == 0
    bench.check_tokens(first, twin)
    assert bench.outputs[-1].cached_tokens == 0


# --- adopted sequences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prompt", [5, 8, 9])
def test_an_adopted_sequence_goes_on_without_recomputing(num_prompt: int) -> None:
    bench = Bench()
    arrival = request("arrival", num_prompt, max_tokens=6, generated=1)
    assert bench.reserve(arrival)
    bench.adopt(arrival)
    bench.run()
    assert bench.batches[0] == [("arrival", num_prompt, 1)]
    assert bench.outputs[0].first_index == 1
    bench.check_tokens(arrival)
    bench.check_idle()


@pytest.mark.parametrize("num_prompt", [5, 8, 9])
def test_adopted_sequences_wait_for_a_seat_with_their_blocks(num_prompt: int) -> None:
    bench = Bench(limits=limits(seqs=2))
    arrivals = [request(name, num_prompt, max_tokens=6, generated=1) for name in "abcde"]
    for arrival in arrivals:
        assert bench.reserve(arrival)
        bench.adopt(arrival)
    bench.run()
    assert all(num_new == 1 for batch in bench.batches for _, _, num_new in batch), "nothing is computed again"
    bench.check_tokens(*arrivals)
    bench.check_idle()


def test_adopted_sequences_without_a_seat_give_their_blocks_to_older_ones() -> None:
    bench = Bench(num_blocks=9, limits=limits(seqs=2))
    arrivals = [request(name, 9, max_tokens=20, generated=1) for name in "abc"]
    for arrival in arrivals:
        assert bench.reserve(arrival)
        bench.adopt(arrival)
    bench.run()
    assert bench.engine.stats().num_preemptions >= 1
    bench.check_tokens(*arrivals)
    bench.check_idle()


def test_the_blocks_of_an_adopted_prompt_serve_later_ones() -> None:
    bench = Bench()
    arrival = request("arrival", 12, generated=1)
    assert bench.reserve(arrival)
    bench.adopt(arrival)
    bench.run()
    bench.send(Add(request("second", 0, prompt=[*arrival.prompt_ids, 5])))
    bench.run()
    assert bench.outputs[-1].cached_tokens == 12


# --- drafts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [1, 3, 9])
@pytest.mark.parametrize("num_prompt", [1, 8, 17])
def test_zero_to_k_plus_one_tokens_a_step_give_the_tokens_of_one(lookahead: int, num_prompt: int) -> None:
    bench = Bench(num_blocks=20, lookahead=lookahead, seed=num_prompt)
    requests = [request(name, num_prompt, max_tokens=15) for name in "abc"]
    bench.send(*map(Add, requests))
    bench.run()
    sizes = {len(output.token_ids) for output in bench.outputs if not output.finish}
    assert max(sizes) == min(lookahead + 1, max(sizes)) > 1
    bench.check_tokens(*requests)
    bench.check_idle()


def test_blocks_for_refused_drafts_are_returned_after_each_step() -> None:
    bench = Bench(lookahead=9)
    bench.send(Add(request("a", 6, max_tokens=12)))
    while bench.step():
        for sequence in bench.engine.scheduler.running:
            assert len(sequence.block_ids) == -(-len(sequence.tokens) // 4)
    bench.check_idle()


def test_drafts_never_cost_another_sequence_its_blocks() -> None:
    bench = Bench(num_blocks=8, lookahead=9)
    requests = [request(name, 8, max_tokens=8) for name in "ab"]
    bench.send(*map(Add, requests))
    bench.run()
    assert bench.engine.stats().num_preemptions == 0
    bench.check_tokens(*requests)


def test_a_sequence_that_fills_the_pool_ends_in_spite_of_drafts() -> None:
    bench = Bench(num_blocks=4, lookahead=5)
    full = request("full", 8, max_tokens=8)
    bench.send(Add(full))
    bench.run()
    bench.check_tokens(full)


def test_a_step_that_accepts_nothing_changes_nothing() -> None:
    bench = Bench(lookahead=2)
    bench.send(Add(request("a", 5)))
    bench.step()
    (sequence,) = bench.engine.scheduler.running
    before = (list(sequence.tokens), sequence.computed, list(sequence.block_ids))
    batch = bench.engine.begin()
    assert batch is not None
    bench.engine.finish(batch, [Sampled()])
    assert (sequence.tokens, sequence.computed, sequence.block_ids) == before
    assert bench.engine.take_outputs().tokens == ()


# --- any mix --------------------------------------------------------------------------------------------------

SHAPES = st.builds(
    limits, block_size=st.sampled_from([1, 3, 4]), tokens=st.integers(8, 20), seqs=st.integers(1, 6),
    chunk=st.integers(1, 8), prefix_cache=st.booleans(),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(shape=SHAPES, lookahead=st.sampled_from([0, 0, 2, 5]), seed=st.integers(0, 10**6))
def test_any_mix_of_arrivals_gives_each_its_own_tokens_and_leaks_nothing(
    shape: SchedulerLimits, lookahead: int, seed: int
) -> None:
    """Adds, hand-offs, adoptions, aborts and releases, in a pool that holds about three sequences."""
    numbers = random.Random(seed)
    bench = Bench(num_blocks=90 // shape.block_size, lookahead=lookahead, limits=shape, seed=seed)
    mix = Mix(bench, numbers)
    for _ in range(80):
        if numbers.random() < 0.4:
            mix.happen()
        bench.step()
        assert bench.engine.blocks.num_leaked(bench.engine._live_tables()) == 0
    mix.end()
    bench.run()
    bench.check_idle()
    mix.check()


class Mix:
    """Random events of an engine's life, and what must come of them."""

    def __init__(self, bench: Bench, numbers: random.Random) -> None:
        self.bench = bench
        self.numbers = numbers
        self.whole: list[Request] = []
        self.handed: list[Request] = []
        self.adoptable: list[Request] = []
        self.count = 0

    def happen(self) -> None:
        self.numbers.choice([self.add, self.add, self.hand_off, self.reserve, self.reserve, self.adopt, self.abort])()

    def add(self) -> None:
        self.whole.append(self._request(generated=self.numbers.choice([0, 0, 2])))
        self.bench.send(Add(self.whole[-1]))

    def hand_off(self) -> None:
        self.handed.append(self._request(generated=self.numbers.choice([0, 0, 1])))
        self.bench.send(Add(self.handed[-1], handoff=True))

    def reserve(self) -> None:
        arrival = self._request(generated=1)
        if self.bench.reserve(arrival, growth=self.numbers.choice([0, 4])):
            self.adoptable.append(arrival)

    def adopt(self) -> None:
        if self.adoptable:
            arrival = self.adoptable.pop(0)
            self.bench.adopt(arrival)
            self.whole.append(arrival)

    def abort(self) -> None:
        known = [*self.whole, *self.handed, *self.adoptable]
        if known:
            key = self.numbers.choice(known).key
            self.bench.send(Abort(key))
            self.whole = [item for item in self.whole if item.key != key]
            self.handed = [item for item in self.handed if item.key != key]
            self.adoptable = [item for item in self.adoptable if item.key != key]

    def end(self) -> None:
        """What outsiders hold is given back, however late."""
        for arrival in self.adoptable:
            self.bench.send(Release(arrival.key))
        for _ in range(MAX_STEPS):
            if self.bench.step() is None:
                assert self.release_done() or not self.bench.engine.has_work, "stuck"
                if not self.bench.engine.has_work:
                    return
        raise AssertionError("the engine does not come to an end")

    def release_done(self) -> bool:
        done = [item for item in self.handed if item.key in self.bench.tokens]
        for item in done:
            self.bench.send(Release(item.key))
        return bool(done)

    def check(self) -> None:
        for item in self.whole:
            self.bench.check_tokens(item)
        for item in self.handed:
            tokens = self.bench.tokens[item.key]  # one, or more where drafts were accepted with it
            assert tokens and tokens == next_tokens([*item.prompt_ids, *item.generated_ids], len(tokens))

    def _request(self, generated: int) -> Request:
        """Prompts begin with one of two common prefixes, so that they share blocks."""
        self.count += 1
        start = [self.numbers.choice((7, 8))] * self.numbers.randrange(1, 20)
        tail = [self.numbers.randrange(VOCAB) for _ in range(self.numbers.choice((0, 0, 3, 6)))]
        return request(
            str(self.count), 0, max_tokens=self.numbers.randrange(2, 10) + generated, generated=generated,
            prompt=start + tail,
        )  # fmt: skip
