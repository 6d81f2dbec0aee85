"""Groups of layers that see only a window: which blocks they keep, share, transfer and give back.

The model is a table of slots: each group writes a digest of the tokens so far to the slot of each new position, and
every position that a query sees must hold the right one. Blocks of all groups come from one pool, so a block that went
to the wrong group, or was given back too early, shows as a wrong digest.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_table import first_needed, num_blocks_for, transfer_entries
from engine.engine import Engine, EngineSpec
from engine.planes import MAX_GROUPS_OF_A_WINDOW, Group, attention_layout
from engine.runs import gaps
from engine.scheduler import Batch, Scheduled, SchedulerLimits
from engine.types import (
    Add,
    Adopt,
    FinishReason,
    Key,
    Progress,
    Release,
    Request,
    Reserve,
    Sampled,
    SamplingParams,
    StepOutputs,
)

BLOCK = 4
FULL, WINDOW = Group((0, 3)), Group((1, 2), window=6)
OTHER = Group((4,), window=6)
GROUPS = (FULL, WINDOW, OTHER)
VOCAB = 50
MAX_TURNS = 2000


def digest(tokens: Iterable[int], group: int) -> int:
    return hash((tuple(tokens), group))


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % VOCAB


@dataclass
class Slots:
    """Implements engine.engine.ModelRunner; `slots` is (block, offset) -> digest."""

    groups: tuple[Group, ...]
    slots: dict[tuple[int, int], int] = field(default_factory=dict)

    def execute(self, batch: Batch) -> list[Sampled]:
        for source, target in batch.copies:
            for offset in range(BLOCK):
                if (source, offset) in self.slots:
                    self.slots[target, offset] = self.slots[source, offset]
        for item in batch.scheduled:
            self._write(item)
        for item in batch.scheduled:
            self._check(item)
        return [Sampled((next_token(item.sequence.tokens),) if item.samples else ()) for item in batch.scheduled]

    def _write(self, item: Scheduled) -> None:
        for index, table in enumerate(item.sequence.tables):
            for position in range(item.start, item.start + item.num_new):
                value = digest(item.sequence.tokens[: position + 1], index)
                self.slots[table[position // BLOCK], position % BLOCK] = value

    def _check(self, item: Scheduled) -> None:
        for index, (group, table) in enumerate(zip(self.groups, item.sequence.tables, strict=True)):
            first = item.start if group.window is None else max(0, item.start - group.window + 1)
            first = 0 if group.window is None else first
            for position in range(first, item.start + item.num_new):
                found = self.slots.get((table[position // BLOCK], position % BLOCK))
                assert found == digest(item.sequence.tokens[: position + 1], index), f"group {index} at {position}"


@dataclass
class Bench:
    """An engine with windows, and what came out of it."""

    groups: tuple[Group, ...] = GROUPS
    num_blocks: int = 120
    chunk: int = 8
    max_tokens: int = 32
    tokens: dict[Key, list[int]] = field(default_factory=dict)
    progress: dict[Key, Progress] = field(default_factory=dict)
    names: dict[Key, tuple[bytes, ...]] = field(default_factory=lambda: defaultdict(tuple))
    num_moved: int = 0  # blocks that came from another engine

    def __post_init__(self) -> None:
        limits = SchedulerLimits(BLOCK, self.max_tokens, 8, self.chunk, groups=self.groups)
        self.engine = Engine(EngineSpec(limits, self.num_blocks, 512, VOCAB, frozenset(), b"windows"))
        self.runner = Slots(self.groups)

    def step(self) -> bool:
        batch = self.engine.begin()
        self._take(self.engine.take_outputs())
        if batch is None:
            return False
        self.engine.finish(batch, self.runner.execute(batch))
        self._take(self.engine.take_outputs())
        return True

    def run(self, *requests: Request) -> list[list[int]]:
        for request in requests:
            self.engine.handle(Add(request))
        for _ in range(MAX_TURNS):
            if not self.step():
                assert not self.engine.has_work, "nothing goes on, yet not all is done"
                return [self.tokens[request.key] for request in requests]
        raise AssertionError("no end")

    def _take(self, outputs: StepOutputs) -> None:
        for output in outputs.tokens:
            assert output.finish is not FinishReason.ERROR, output.error
            self.tokens.setdefault(output.key, []).extend(output.token_ids)
        self.progress |= {progress.key: progress for progress in outputs.progress}
        self.names |= {progress.key: progress.names for progress in outputs.progress if progress.names}

    def assert_empty(self) -> None:
        stats = self.engine.stats()
        assert (stats.num_leaked_blocks, stats.num_held, stats.num_running) == (0, 0, 0)
        assert stats.num_free_blocks == stats.num_blocks


def request(name: str, prompt: Iterable[int], max_tokens: int = 8) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0))


def expected(prompt: Iterable[int], count: int) -> list[int]:
    tokens = list(prompt)
    start = len(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[start:]


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(VOCAB) for _ in range(length))


# --- tables and layouts ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 16))
def test_a_window_keeps_exactly_the_blocks_that_a_later_query_sees(window: int, position: int, size: int) -> None:
    first = first_needed(Group((0,), window), position, size)
    seen = range(max(0, position - window + 1), position + 1)
    assert first == seen.start // size
    assert first_needed(Group((0,)), position, size) == 0


@given(st.integers(1, 100), st.integers(1, 16))
def test_what_is_transferred_comes_by_position_and_is_all_that_the_next_token_sees(num_tokens: int, size: int) -> None:
    entries = transfer_entries(GROUPS, num_tokens, size)
    assert [index for _, index in entries] == sorted(index for _, index in entries)
    assert len(entries) == len(dict.fromkeys(entries))
    for number, group in enumerate(GROUPS):
        indices = [index for which, index in entries if which == number]
        assert indices == list(range(first_needed(group, num_tokens, size), num_blocks_for(num_tokens, size)))


def test_layers_of_one_window_are_cut_into_groups_as_large_as_the_rarest_kind() -> None:
    windows = [512, 512, 512, 512, 512, None] * 3
    layout = attention_layout(18, 1, 8, BLOCK, "float32", windows)
    assert [len(group.layer_ids) for group in layout.groups] == [3] * 6
    assert [group.window for group in layout.groups].count(None) == 1
    places = layout.places()
    assert sorted(places) == list(range(18)) and len(dict.fromkeys(places.values())) == 18
    assert all(layout.groups[group].window == windows[layer] for layer, (group, _) in places.items())
    assert layout.planes[0].num_slots == 3


def test_a_rare_kind_of_layer_does_not_cut_the_others_into_too_many_groups() -> None:
    layout = attention_layout(64, 1, 8, BLOCK, "float32", [512] * 63 + [None])
    assert len(layout.groups) <= MAX_GROUPS_OF_A_WINDOW + 1


def test_a_model_without_windows_or_with_one_everywhere_has_one_group() -> None:
    for windows in ((), [None] * 4, [128] * 4):
        assert len(attention_layout(4, 1, 8, BLOCK, "float32", windows).groups) == 1


# --- engines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [GROUPS, (WINDOW,), (FULL,)], ids=["mixed", "windows only", "full only"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_tokens_are_right_for_any_chunk_and_nothing_is_left(groups: tuple[Group, ...], chunk: int) -> None:
    bench = Bench(groups, chunk=chunk)
    prompts = [prompt_of(length, length) for length in (1, 5, 23, 40)]
    found = bench.run(*(request(str(index), prompt, 30) for index, prompt in enumerate(prompts)))
    assert found == [expected(prompt, 30) for prompt in prompts]
    bench.assert_empty()


def test_a_long_answer_holds_no_more_blocks_than_its_windows_need() -> None:
    bench = Bench((WINDOW,), num_blocks=30)
    bench.engine.handle(Add(request("a", prompt_of(5), 80)))
    most = 0
    while bench.step():
        most = max(most, *(len(sequence.block_ids) for sequence in bench.engine.scheduler.running), 0)
    assert bench.tokens[Key("a", 0)] == expected(prompt_of(5), 80)
    assert most == 2, "six positions, the last of them not stored yet, lie in two blocks of four"
    bench.assert_empty()


def test_a_prefix_is_found_again_when_its_window_is_still_cached() -> None:
    bench = Bench()
    prompt = prompt_of(40)
    bench.run(request("a", prompt, 4))
    again = request("b", (*prompt[:33], 1, 2, 3), 6)
    assert bench.run(again) == [expected(again.prompt_ids, 6)]
    assert bench.engine.stats().prefix_hits == 32
    whole = request("c", prompt, 4)
    assert bench.run(whole) == [expected(prompt, 4)]
    assert bench.engine.stats().prefix_hits == 32 + 39, "all but the last token"
    bench.assert_empty()


def test_a_prefix_whose_window_was_evicted_is_computed_again() -> None:
    bench = Bench(num_blocks=60)
    prompt = prompt_of(24)
    bench.run(request("a", prompt, 2))
    block_of = bench.engine.blocks
    bench.run(*(request(f"x{seed}", prompt_of(40, seed), 2) for seed in range(5, 9)))
    assert block_of.num_available == 60
    assert bench.run(request("b", prompt, 10)) == [expected(prompt, 10)]
    bench.assert_empty()


def test_preempted_sequences_go_on_with_the_same_tokens() -> None:
    bench = Bench(num_blocks=42)
    prompts = [prompt_of(12, seed) for seed in range(4)]
    found = bench.run(*(request(str(index), prompt, 35) for index, prompt in enumerate(prompts)))
    assert found == [expected(prompt, 35) for prompt in prompts]
    assert bench.engine.stats().num_preemptions > 0
    bench.assert_empty()


def hand_over(source: Bench, target: Bench, asked: Request) -> list[int]:
    """Prefill on one engine, decode on another: only the transferred blocks cross, in their order."""
    source.engine.handle(Add(asked, handoff=True))
    while source.step():
        pass
    sent = source.progress[asked.key]
    assert sent.done and sent.computed == len(asked.prompt_ids)
    target.engine.handle(Reserve(asked.key, len(asked.prompt_ids), 8, names=source.names[asked.key]))
    (reserved,) = target.engine.take_outputs().reserved
    assert reserved.block_ids is not None
    pairs = [*zip(sent.block_ids, reserved.block_ids, strict=False)]
    missing = [number for run in gaps(reserved.present, range(len(pairs))) for number in run]
    target.num_moved += len(missing)
    for there, here in [pairs[number] for number in missing]:
        for offset in range(BLOCK):
            target.runner.slots.pop((here, offset), None)
            if (there, offset) in source.runner.slots:
                target.runner.slots[here, offset] = source.runner.slots[there, offset]
    first = tuple(source.tokens[asked.key])
    going_on = Request(asked.request_id, asked.prompt_ids, asked.sampling, generated_ids=first)
    target.engine.handle(Adopt(going_on, sent.computed))
    source.engine.handle(Release(asked.key))
    while target.step():
        pass
    return [*first, *target.tokens[asked.key]]


@pytest.mark.parametrize("groups", [GROUPS, (WINDOW,)], ids=["mixed", "windows only"])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 16, 33])
def test_a_hand_off_moves_just_what_the_next_token_sees(groups: tuple[Group, ...], length: int) -> None:
    source, target = Bench(groups), Bench(groups)
    prompt = prompt_of(length)
    assert hand_over(source, target, request("a", prompt, 20)) == expected(prompt, 20)
    assert len(source.progress[Key("a", 0)].block_ids) == len(transfer_entries(groups, length, BLOCK))
    source.assert_empty()
    target.assert_empty()


def test_a_hand_off_after_a_prefix_hit_has_all_its_blocks() -> None:
    source, target = Bench(), Bench()
    prompt = prompt_of(40)
    source.run(request("warm", prompt[:20], 3))
    assert hand_over(source, target, request("a", prompt, 12)) == expected(prompt, 12)
    source.assert_empty()


@pytest.mark.parametrize("groups", [GROUPS, (WINDOW,), (FULL,)], ids=["mixed", "windows only", "full only"])
@pytest.mark.parametrize("length", [3, 8, 20, 37])
def test_a_second_turn_moves_only_what_the_target_has_not_kept(groups: tuple[Group, ...], length: int) -> None:
    source, target = Bench(groups), Bench(groups)
    prompt = prompt_of(length)
    answer = hand_over(source, target, request("first", prompt, 20))
    num_first = target.num_moved
    assert num_first == len(transfer_entries(groups, length, BLOCK))
    turn = (*prompt, *answer, *prompt_of(9, 7))
    assert hand_over(source, target, request("second", turn, 12)) == expected(turn, 12)
    num_kept = (length + 19) // BLOCK  # full blocks: the last token's KV was never stored
    entries = transfer_entries(groups, len(turn), BLOCK)
    num_missing = sum(index >= num_kept for _, index in entries)
    assert target.num_moved - num_first == num_missing
    assert num_missing < len(entries) or FULL not in groups, "a window may have gone on past all that was kept"
    source.assert_empty()
    target.assert_empty()


@given(st.data())
def test_any_turns_on_a_pool_under_pressure_give_the_tokens_of_one_engine(data: st.DataObject) -> None:
    smallest = 3 * 17  # a table of three groups for the longest, 65 tokens: with less it would be refused
    source, target = Bench(num_blocks=120), Bench(num_blocks=data.draw(st.integers(smallest, 70)))
    base = prompt_of(40, 3)
    for number in range(data.draw(st.integers(2, 6))):
        kept, own = data.draw(st.integers(0, 40)), prompt_of(data.draw(st.integers(1, 9)), 50 + number)
        asked = request(str(number), (*base[:kept], *own), data.draw(st.integers(2, 16)))
        found = hand_over(source, target, asked)
        assert found == expected(asked.prompt_ids, asked.sampling.max_tokens)
        base = (*asked.prompt_ids, *found, *base)[:40]
        target.assert_empty()


def test_blocks_are_told_as_ready_only_when_they_are_full_and_stay_in_order() -> None:
    bench = Bench(chunk=5)
    asked = request("a", prompt_of(23), 4)
    bench.engine.handle(Add(asked, handoff=True))
    told: list[tuple[int, ...]] = []
    while bench.step():
        progress = bench.progress[asked.key]
        entries = transfer_entries(GROUPS, 23, BLOCK)
        full = [entry for entry in entries if progress.done or entry[1] < progress.computed // BLOCK]
        assert len(progress.block_ids) == len(full)
        told.append(progress.block_ids)
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(told))


def test_a_window_that_was_not_reserved_is_not_adopted() -> None:
    bench = Bench()
    bench.engine.handle(Reserve(Key("a", 0), 20))
    bench.engine.take_outputs()
    asked = Request("a", prompt_of(20), SamplingParams(), generated_ids=(1,))
    bench.engine.handle(Adopt(asked, 7))
    (output,) = bench.engine.take_outputs().tokens
    assert output.error is not None and output.error.code == "transfer_failed"
    bench.assert_empty()


@given(st.data())
def test_any_mix_of_requests_gives_the_tokens_of_each_alone(data: st.DataObject) -> None:
    bench = Bench(num_blocks=data.draw(st.integers(45, 90)), chunk=data.draw(st.integers(1, 9)))
    base = prompt_of(30, 1)
    requests = []
    for index in range(data.draw(st.integers(1, 6))):
        kept = data.draw(st.integers(0, 30))
        own = prompt_of(data.draw(st.integers(1, 12)), 100 + index)
        requests.append(request(str(index), (*base[:kept], *own), data.draw(st.integers(1, 12))))
    found = bench.run(*requests)
    assert found == [expected(one.prompt_ids, one.sampling.max_tokens) for one in requests]
    bench.assert_empty()
