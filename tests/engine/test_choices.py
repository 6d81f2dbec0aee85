"""Several answers to one prompt: computed once, forked by copy-on-write, equal to as many requests of their own."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from engine.build import BuiltEngine
from engine.types import (
    Abort,
    Add,
    Adopt,
    FinishReason,
    Key,
    Progress,
    Release,
    Request,
    Reserve,
    Reserved,
    StepOutputs,
    TokenOutput,
)
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

CONFIG = tiny_config()
WINDOWED = tiny_config(num_layers=3, layer_windows=(6, 6, None))
WEIGHTS = {config: random_weights(config, seed=2) for config in (CONFIG, WINDOWED)}
SAMPLED = {"temperature": 1.0, "seed": 77, "frequency_penalty": 0.5}


def answers(prompt: tuple[int, ...], num: int, max_tokens: int = 9, name: str = "a", **more: Any) -> list[Request]:
    """As many answers to one prompt; the first names the prompt's blocks."""
    first = request(name, prompt, max_tokens, **SAMPLED, **more)
    return [first, *(first.sibling(Key(f"{name}-{choice}", 0), choice) for choice in range(1, num))]


def alone(config: Any, requests: list[Request]) -> dict[Key, list[int]]:
    """The tokens of each, by an engine that computes nothing else."""
    built = tiny_engine(config, WEIGHTS[config], prefix_cache=False)
    return {one.key: run(built.engine, built.runner, [one])[one.key] for one in requests}


class Driven:
    """An engine that is turned by hand, and what it has said."""

    def __init__(self, built: BuiltEngine) -> None:
        self.engine, self.runner, self.cache = built.engine, built.runner, built.cache
        self.tokens: dict[Key, list[int]] = {}
        self.finished: dict[Key, FinishReason] = {}
        self.outputs: list[TokenOutput] = []
        self.progress: dict[Key, Progress] = {}
        self.reserved: dict[Key, Reserved] = {}
        self.offset = 0  # tokens that answers have when they come here

    def turn(self) -> bool:
        batch = self.engine.begin()
        self.listen()
        if batch is not None:
            self.engine.finish(batch, self.runner.execute(batch))
            self.listen()
        return batch is not None

    def listen(self) -> None:
        self._collect(self.engine.take_outputs())

    def run(self) -> None:
        for _ in range(2000):
            if not self.turn():
                return
        raise AssertionError("the engine does not come to an end")

    def check_idle(self) -> None:
        self.engine.begin()
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_held, stats.num_leaked_blocks) == (0, 0, 0, 0)
        assert stats.num_free_blocks == stats.num_blocks

    def _collect(self, outputs: StepOutputs) -> None:
        for output in outputs.tokens:
            known = self.tokens.setdefault(output.key, [])
            assert output.finish is FinishReason.ABORT or output.first_index == len(known) + self.offset
            known += output.token_ids
            self.outputs.append(output)
            if output.finish:
                assert output.key not in self.finished, "it ended twice"
                self.finished[output.key] = output.finish
        self.progress |= {one.key: one for one in outputs.progress}
        self.reserved |= {one.key: one for one in outputs.reserved}


def driven(config: Any = CONFIG, **limits: Any) -> Driven:
    return Driven(tiny_engine(config, WEIGHTS[config], **limits))


def add(engine: Driven, requests: list[Request], handoff: bool = False) -> None:
    engine.engine.handle(Add(requests[0], handoff, tuple(requests[1:])))


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["one group", "windows"])
@pytest.mark.parametrize("length", [1, 3, 8, 21])
@pytest.mark.parametrize("limits", [{}, {"prefix_cache": False}, {"prefill_chunk": 5}, {"max_batch_seqs": 2}], ids=str)
def test_answers_equal_requests_of_their_own(config: Any, length: int, limits: dict[str, Any]) -> None:
    asked = answers(random_prompt(config, length, length), 4)
    one = driven(config, shuffle_seed=3, **limits)
    add(one, asked)
    one.run()
    assert one.tokens == alone(config, asked)
    assert len({tuple(tokens) for tokens in one.tokens.values()}) > 1, "the answers differ"
    one.check_idle()


def test_the_prompt_is_computed_once_and_its_blocks_are_shared() -> None:
    asked = answers(random_prompt(CONFIG, 22, 0), 6)
    one = driven()
    add(one, asked)
    one.turn()  # the prompt
    assert len(one.tokens) == 6 and one.engine.stats().prefix_queries == 22
    used = one.engine.blocks.num_blocks - one.engine.blocks.num_available
    assert used == 5 + 1 + 5, "five full blocks, and the one that all write to, for each"
    one.run()
    one.check_idle()


def test_logprobs_come_with_every_answer_and_the_prompt_s_once() -> None:
    asked = answers(random_prompt(CONFIG, 9, 0), 3, logprobs=2, prompt_logprobs=1)
    one = driven()
    add(one, asked)
    one.run()
    assert all(len(output.logprobs) == len(output.token_ids) for output in one.outputs)
    with_prompt = [output for output in one.outputs if output.prompt_logprobs]
    assert [output.key for output in with_prompt] == [asked[0].key] and len(with_prompt[0].prompt_logprobs) == 8


def test_answers_that_end_with_their_first_token_are_not_forked() -> None:
    prompt = random_prompt(CONFIG, 10, 1)
    firsts = {key: tokens[0] for key, tokens in alone(CONFIG, answers(prompt, 5, 1)).items()}
    ends = firsts[Key("a", 0)]
    asked = answers(prompt, 5, stop_token_ids=(ends,))
    one = driven()
    add(one, asked)
    one.turn()
    ended = [key for key, token_id in firsts.items() if token_id == ends]
    assert [key for key, reason in one.finished.items() if reason is FinishReason.STOP] == ended
    one.run()
    assert one.tokens == alone(CONFIG, asked)
    one.check_idle()


def test_answers_go_on_where_blocks_are_short() -> None:
    """Copies that do not fit make their answers wait; growth preempts the youngest."""
    asked = answers(random_prompt(CONFIG, 14, 4), 8, max_tokens=24)
    one = driven(num_blocks=12)
    add(one, asked)
    one.run()
    assert one.tokens == alone(CONFIG, asked)
    assert one.engine.stats().num_preemptions > 0
    one.check_idle()


def test_an_answer_that_waits_for_a_block_is_not_overtaken() -> None:
    """A prompt that came later is short enough to go ahead of any that had not begun."""
    asked = answers(random_prompt(CONFIG, 30, 4), 4, max_tokens=4)
    one = driven(num_blocks=10, prefill_chunk=8)
    add(one, asked)
    while asked[0].key not in one.tokens:
        one.turn()
    assert len(one.engine.scheduler.waiting) == 1, "its copy found no block"
    late = request("late", random_prompt(CONFIG, 4, 1), 1)
    one.engine.handle(Add(late))
    while late.key not in one.finished:
        one.turn()
    begun = [key for key in one.tokens if len(one.tokens[key]) > 1]
    assert {each.key for each in asked} <= {*begun, late.key}, "all went on before"
    one.run()
    one.check_idle()


def test_an_answer_can_be_ended_before_and_after_the_fork() -> None:
    asked = answers(random_prompt(CONFIG, 30, 5), 4)
    wanted = alone(CONFIG, asked)
    one = driven(prefill_chunk=8)
    add(one, asked)
    one.turn()
    for gone in asked[:2]:  # the first names the blocks
        one.engine.handle(Abort(gone.key))
    while asked[2].key not in one.tokens:
        one.turn()
    one.engine.handle(Abort(asked[2].key))  # its copy is not made yet
    one.run()
    assert [one.finished[gone.key] for gone in asked[:3]] == [FinishReason.ABORT] * 3
    assert one.tokens[asked[3].key] == wanted[asked[3].key]
    one.check_idle()


def test_ending_all_answers_ends_the_prompt() -> None:
    asked = answers(random_prompt(CONFIG, 30, 5), 3)
    one = driven(prefill_chunk=8)
    add(one, asked)
    one.turn()
    for gone in asked:
        one.engine.handle(Abort(gone.key))
    one.check_idle()


def hand_over(source: Driven, target: Driven, asked: list[Request]) -> list[Request]:
    """Prefill there, and adopt here what goes on."""
    add(source, asked, handoff=True)
    source.run()
    key, num_tokens = asked[0].key, len(asked[0].prompt_ids)
    going = [one for one in asked if one.key not in source.finished]
    handed = [replace(one, generated_ids=tuple(source.tokens[one.key])) for one in going]
    if going:
        sent = source.progress[key]
        assert sent.done and sent.computed == num_tokens
        target.engine.handle(Reserve(key, num_tokens, 8, len(asked)))
        target.listen()
        block_ids = target.reserved[key].block_ids
        assert block_ids is not None
        for there, here in zip(sent.block_ids, block_ids, strict=False):
            for index, plane in enumerate(source.cache.layout.planes):
                slots = range(plane.num_slots)
                target.cache.write(index, slots, [here], memoryview(source.cache.read(index, slots, [there])))
        target.offset = 1
        target.engine.handle(Adopt(handed[0], num_tokens, 0, tuple(handed[1:]), reserved=key))
        source.engine.handle(Release(key))
    return handed


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["one group", "windows"])
@pytest.mark.parametrize("length", [4, 11])
def test_a_hand_off_carries_all_answers_at_once(config: Any, length: int) -> None:
    source, target = driven(config, shuffle_seed=1), driven(config, shuffle_seed=2)
    asked = answers(random_prompt(config, length, 6), 4)
    handed = hand_over(source, target, asked)
    target.run()
    wanted = alone(config, asked)
    assert {one.key: [*one.generated_ids, *target.tokens[one.key]] for one in handed} == wanted
    source.check_idle()
    target.check_idle()


@pytest.mark.parametrize("num_blocks", range(9, 14))
def test_an_answer_that_was_handed_over_and_preempted_finds_no_block_of_another(num_blocks: int) -> None:
    """The first token ends a block: from there on the answers' blocks have different names."""
    source, target = driven(), driven(num_blocks=num_blocks)
    asked = answers(random_prompt(CONFIG, 11, 6), 4)
    handed = hand_over(source, target, asked)
    target.run()
    assert target.engine.stats().num_preemptions > 0
    wanted = alone(CONFIG, asked)
    assert {one.key: [*one.generated_ids, *target.tokens[one.key]] for one in handed} == wanted
    target.check_idle()


def test_a_hand_off_leaves_out_answers_that_have_ended_even_the_one_that_names_it() -> None:
    prompt = random_prompt(CONFIG, 10, 1)
    firsts = alone(CONFIG, answers(prompt, 5, 1))
    asked = answers(prompt, 5, stop_token_ids=tuple(firsts[Key("a", 0)]))
    source, target = driven(), driven()
    handed = hand_over(source, target, asked)
    assert handed and asked[0].key not in [one.key for one in handed]
    target.run()
    wanted = alone(CONFIG, asked)
    assert all([*one.generated_ids, *target.tokens[one.key]] == wanted[one.key] for one in handed)
    source.check_idle()
    target.check_idle()


def test_answers_that_cannot_all_grow_at_once_are_still_taken_in() -> None:
    """Their growth is more than the pool; one that needs as much for itself is refused, as ever."""
    one = driven(num_blocks=64)
    one.engine.handle(Reserve(Key("a", 0), 20, 40, 16))
    one.engine.handle(Reserve(Key("b", 0), 20, 300, 1))
    one.listen()
    assert one.reserved[Key("a", 0)].block_ids is not None
    assert one.reserved[Key("b", 0)].block_ids is None


@pytest.mark.parametrize("seed", range(40))
def test_no_block_is_lost_in_any_mix_of_forks_and_aborts(seed: int) -> None:
    chance = random.Random(seed)
    one = driven(num_blocks=chance.choice([16, 24, 64]), prefill_chunk=chance.choice([3, 64]), shuffle_seed=seed)
    wanted: dict[Key, list[int]] = {}
    live: list[Key] = []
    for index in range(chance.randint(1, 4)):
        asked = answers(
            random_prompt(CONFIG, chance.randint(1, 24), chance.randint(0, 2)), chance.randint(1, 5),
            chance.randint(1, 12), f"r{index}", 
        )  # fmt: skip
        wanted |= alone(CONFIG, asked)
        live += [each.key for each in asked]
        add(one, asked)
        for _ in range(chance.randint(0, 4)):
            one.turn()
            if chance.random() < 0.4:
                one.engine.handle(Abort(chance.choice(live)))
    one.run()
    assert one.finished.keys() == wanted.keys()
    for key, tokens in wanted.items():
        is_aborted = one.finished[key] is FinishReason.ABORT
        assert one.tokens[key] == (tokens[: len(one.tokens[key])] if is_aborted else tokens)
    one.check_idle()
