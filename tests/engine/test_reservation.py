"""Reservations over blocks that the engine has already: shared, counted once, never written to, never left behind."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_table import transfer_entries
from engine.build import BuiltEngine
from engine.engine import Engine
from engine.prefix import extend_hashes, root_hash
from engine.reservation import names_here
from engine.runs import gaps, runs_of
from engine.types import Abort, Add, Adopt, Key, Release, Request, Reserve, Reserved, SamplingParams
from tests.engine.test_engine import BLOCK, Script, assert_empty, make_engine, only_error, request, run, turn
from tests.engine.tiny import random_prompt, random_weights, tiny_config, tiny_engine
from tests.engine.tiny import run as run_requests

KEY = Key("a", 0)
PROMPT = tuple(range(5, 26))  # five full blocks and a token


def names_of(tokens: Iterable[int], namespace: str = "") -> tuple[bytes, ...]:
    names: list[bytes] = []
    extend_hashes(b"key", names, root_hash(b"key", namespace), tuple(tokens), BLOCK)
    return tuple(names)


def reserve(engine: Engine, prompt: tuple[int, ...] = PROMPT, growth: int = 0, key: Key = KEY) -> Reserved:
    engine.handle(Reserve(key, len(prompt), growth, names=names_of(prompt)))
    (answer,) = engine.take_outputs().reserved
    return answer


def warm(engine: Engine, prompt: tuple[int, ...] = PROMPT) -> None:
    """So that the full blocks of the prompt are cached."""
    engine.handle(Add(request("warm", prompt=prompt, max_tokens=1)))
    run(engine, Script())


def numbers(reserved: Reserved) -> list[int]:
    return [*chain.from_iterable(reserved.present)]


@given(st.lists(st.integers(0, 40), unique=True).map(sorted), st.integers(0, 40), st.integers(0, 20))
def test_runs_and_gaps_divide_a_range(inside: list[int], start: int, length: int) -> None:
    runs, within = runs_of(inside), range(start, start + length)
    assert [*chain.from_iterable(runs)] == inside
    assert all(earlier.stop < later.start for earlier, later in pairwise(runs))
    missing = [*chain.from_iterable(gaps(runs, within))]
    assert missing == [number for number in within if number not in inside]
    assert all(gaps(runs, within))


def test_only_the_full_blocks_of_the_prompt_are_shared_and_the_rest_is_fresh() -> None:
    engine = make_engine(num_blocks=16)
    warm(engine)
    assert engine.stats().num_cached_blocks == 5
    reserved = reserve(engine)
    assert reserved.block_ids is not None and reserved.present == (range(5),)
    assert len(set(reserved.block_ids)) == 6
    assert engine.stats().num_free_blocks == 10
    assert all(not engine.blocks.is_writable(block_id) for block_id in reserved.block_ids[:5])
    assert engine.blocks.is_writable(reserved.block_ids[5])
    engine.handle(Release(KEY))
    assert engine.stats().num_cached_blocks == 5
    assert_empty(engine)


def test_of_a_prompt_that_is_here_whole_the_next_token_still_gets_a_block_of_its_own() -> None:
    engine = make_engine(num_blocks=16)
    warm(engine, PROMPT[:20])
    reserved = reserve(engine, PROMPT[:20])
    assert reserved.block_ids is not None and reserved.present == (range(5),)
    assert engine.blocks.is_writable(reserved.block_ids[5])
    engine.handle(Adopt(Request("a", PROMPT[:20], SamplingParams(max_tokens=4), generated_ids=(11,)), 20))
    assert [one for output in run(engine, Script(12, 13, 14)) for one in output.token_ids] == [12, 13, 14]
    assert_empty(engine)


def test_what_runs_here_and_an_earlier_reservation_share_with_it() -> None:
    engine = make_engine(num_blocks=16, chunk=32)
    engine.handle(Add(request("running", prompt=PROMPT, max_tokens=9)))
    for _ in range(3):
        turn(engine, Script(11, 12))
    before = engine.stats().num_free_blocks
    first, second = reserve(engine), reserve(engine, key=Key("b", 0))
    assert first.block_ids and second.block_ids and first.block_ids[:5] == second.block_ids[:5]
    assert engine.stats().num_free_blocks == before - 2
    assert reserve(engine) == first, "asked twice, answered alike"
    engine.handle(Abort(KEY))
    engine.handle(Adopt(Request("b", PROMPT, SamplingParams(max_tokens=3), generated_ids=(11,)), 21))
    run(engine, Script())
    assert_empty(engine)


def test_blocks_that_others_hold_are_not_counted_again_and_cached_ones_are() -> None:
    engine = make_engine(num_blocks=8)
    warm(engine)
    reserved = reserve(engine)
    assert reserved.block_ids is not None
    assert engine.stats().num_free_blocks == 2
    assert reserve(engine, growth=4, key=Key("b", 0)).block_ids is not None, "one block, and one to grow"
    refused = reserve(engine, growth=4, key=Key("c", 0))
    assert (refused.block_ids, refused.present, refused.reason) == (None, (), "1+1 blocks wanted, 1 available")


def test_under_pressure_what_is_shared_is_not_evicted_for_it() -> None:
    """Six blocks in all: five are cached, and the reservation needs those and the last one."""
    engine = make_engine(num_blocks=6)
    warm(engine)
    reserved = reserve(engine)
    assert reserved.block_ids is not None and sorted(reserved.block_ids) == list(range(6))
    assert reserved.present == (range(5),)
    assert reserve(engine, tuple(range(50, 55)), key=Key("b", 0)).block_ids is None
    engine.handle(Release(KEY))
    assert_empty(engine)


def test_a_beginning_of_which_the_tail_was_evicted_is_shared_as_far_as_it_is_here() -> None:
    engine = make_engine(num_blocks=6)
    warm(engine)
    other = reserve(engine, tuple(range(50, 57)), key=Key("b", 0))  # takes the free block and the last cached one
    assert other.present == ()
    engine.handle(Release(Key("b", 0)))
    assert reserve(engine).present == (range(4),)


def test_names_of_another_namespace_or_without_a_prefix_cache_find_nothing() -> None:
    engine = make_engine()
    warm(engine)
    engine.handle(Reserve(KEY, len(PROMPT), names=names_of(PROMPT, "another tenant")))
    (reserved,) = engine.take_outputs().reserved
    assert reserved.present == ()


def refusals() -> dict[str, tuple[Request, int, str]]:
    sampling = SamplingParams(max_tokens=4)
    other = (*PROMPT[:6], 77, *PROMPT[7:])
    return {
        "another prompt": (Request("a", other, sampling, generated_ids=(1,)), 21, "named for other tokens"),
        "another tenant": (
            Request("a", PROMPT, sampling, generated_ids=(1,), namespace="x"), 21, "named for other tokens",
        ),
        "fewer positions": (Request("a", PROMPT, sampling, generated_ids=(1,)), 17, "would be written to"),
        "no token": (Request("a", (-1, *PROMPT[1:]), sampling, generated_ids=(1,)), 21, "vocabulary"),
    }  # fmt: skip


@pytest.mark.parametrize(("adopted", "computed", "words"), refusals().values(), ids=refusals())
def test_blocks_under_names_that_the_hand_off_does_not_bear_out_are_never_used(
    adopted: Request, computed: int, words: str
) -> None:
    engine = make_engine()
    warm(engine)
    assert reserve(engine).present == (range(5),)
    engine.handle(Adopt(adopted, computed))
    _, message = only_error(engine)
    assert words in message
    assert_empty(engine)


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["reserve", "adopt", "release", "abort", "add"]), max_size=25))
def test_any_order_of_commands_leaves_every_block_accounted_for(seed: int, steps: list[str]) -> None:
    engine, chance = make_engine(num_blocks=14, max_context=60), random.Random(seed)
    prompts = [PROMPT, PROMPT[:13], (*PROMPT[:8], 60, 61, 62, 63, 64)]
    for number, step in enumerate(steps):
        name = str(chance.randrange(4))
        prompt = prompts[int(name) % 3]
        sampling = SamplingParams(max_tokens=5)
        match step:
            case "reserve":
                engine.handle(Reserve(Key(name, 0), len(prompt), 4, names=names_of(prompt)))
            case "adopt":
                engine.handle(Adopt(Request(name, prompt, sampling, generated_ids=(11,)), len(prompt)))
            case "release":
                engine.handle(Release(Key(name, 0)))
            case "abort":
                engine.handle(Abort(Key(name, 0)))
            case _:
                engine.handle(Add(Request(f"own{number}", prompt, sampling)))
        if chance.random() < 0.6:
            turn(engine, Script())
        assert engine.blocks.num_leaked(engine._live_tables()) == 0
        held = [table for holder, table in engine._live_tables().items() if holder.kind == "reservation"]
        for block_ids in held:
            assert len(set(block_ids)) == len(block_ids)
    for name in map(str, range(4)):
        engine.handle(Abort(Key(name, 0)))
    run(engine, Script())
    assert_empty(engine)


CONFIG = tiny_config()


def test_what_the_host_tier_has_is_loaded_and_need_not_come() -> None:
    """The bytes themselves: a sequence goes on from blocks that were loaded, and nothing was transferred."""
    weights, prompt = random_weights(CONFIG, seed=3), random_prompt(CONFIG, 41, seed=1)
    built = tiny_engine(CONFIG, weights, num_blocks=14, host_tier_blocks=60)
    wanted = run_tiny(built, Request("first", prompt, SamplingParams(max_tokens=6, temperature=0)))
    for seed in (5, 6):
        run_tiny(built, Request(f"other{seed}", random_prompt(CONFIG, 44, seed), SamplingParams(max_tokens=2)))
    size = built.engine.spec.limits.block_size
    names: list[bytes] = []
    extend_hashes(built.engine.spec.hash_key, names, root_hash(built.engine.spec.hash_key, ""), prompt, size)
    entries = transfer_entries(built.engine.spec.limits.groups, 40, size)
    here = names_here(built.engine.blocks, entries, names)
    assert len(here) == 40 // size and any(built.engine.blocks.find(name) is None for name in here.values())
    # All but the last token are here, in full blocks: it is as if the last one were the first that was generated.
    built.engine.handle(Reserve(KEY, 40, names=tuple(names)))
    (reserved,) = built.engine.take_outputs().reserved
    assert numbers(reserved) == list(range(40 // size))
    sampling = SamplingParams(max_tokens=7, temperature=0)
    built.engine.handle(Adopt(Request("a", prompt[:40], sampling, generated_ids=prompt[40:]), 40))
    found: list[int] = []
    while (batch := built.engine.begin()) is not None:
        built.engine.finish(batch, built.runner.execute(batch))
        found += [one for output in built.engine.take_outputs().tokens for one in output.token_ids]
    assert found == wanted
    built.engine.begin()
    assert built.engine.stats().num_leaked_blocks == 0


def run_tiny(built: BuiltEngine, asked: Request) -> list[int]:
    return run_requests(built.engine, built.runner, [asked])[asked.key]
