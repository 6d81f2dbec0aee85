"""Answers that keep to a grammar: they parse, they validate, and they are the same wherever they go on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLTokenizer

from engine.grammar import Grammars, read_vocabulary
from engine.logits import process
from engine.types import Abort, Add, FinishReason, Key, Release, Request, SamplingParams
from router.grammar import json_schema_grammar
from tests.cluster.tiny_model import EOS, VOCAB, byte_tokenizer
from tests.engine.test_choices import Driven, add, answers, hand_over
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine

CONFIG = tiny_config(vocab_size=VOCAB, eos_token_ids=(EOS,), max_context=1024)
WEIGHTS = random_weights(CONFIG, seed=7)
TOKENIZER = byte_tokenizer()
LETTERS = {"type": "string", "pattern": "^[a-z]{2,5}$"}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -3, "maximum": 40}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    POINT,
    {"type": "object", "properties": {"in": POINT, "name": LETTERS}, "required": ["in", "name"],
     "additionalProperties": False},
    {"enum": ["red", "grün", 7, None]},
    {"type": "array", "items": {"anyOf": [LETTERS, {"type": "integer", "minimum": 0, "maximum": 9}]}, "minItems": 2,
     "maxItems": 4},
    {"type": "number", "minimum": 0.5, "maximum": 2.25},
    {"type": "object", "properties": {"schlüssel": {"enum": ["日本", "é"]}}, "required": ["schlüssel"],
     "additionalProperties": False},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "leaf": {"const": 1}}, "required": ["leaf"], "additionalProperties": False}}},
    {"type": "string", "maxLength": 6},
]  # fmt: skip
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "seed": 4, "top_p": 0.9}]
LIMITED = json_schema_grammar(SCHEMAS[1])


def vocabulary() -> LLTokenizer:
    return read_vocabulary(TOKENIZER.to_str(), VOCAB, (EOS,))


def engine(**limits: Any) -> Driven:
    return Driven(tiny_engine(CONFIG, WEIGHTS, grammars=Grammars(vocabulary), **limits))


def asked(grammar: str, name: str = "a", max_tokens: int = 200, **sampling: Any) -> Request:
    return request(name, random_prompt(CONFIG, 11, 1), max_tokens, grammar=grammar, **sampling)


def alone(one: Request) -> list[int]:
    built = tiny_engine(CONFIG, WEIGHTS, prefix_cache=False, grammars=Grammars(vocabulary))
    return run(built.engine, built.runner, [one])[one.key]


def text_of(tokens: list[int]) -> str:
    assert tokens[-1] == EOS
    return TOKENIZER.decode(tokens[:-1])


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_every_answer_parses_and_validates(schema: dict[str, Any]) -> None:
    one = engine()
    for index, sampling in enumerate(SAMPLINGS):
        one.engine.handle(Add(asked(json_schema_grammar(schema), f"r{index}", **sampling)))
    one.run()
    assert set(one.finished.values()) == {FinishReason.STOP}
    for tokens in one.tokens.values():
        jsonschema.validate(json.loads(text_of(tokens)), schema)
    one.check_idle()


def test_one_step_serves_answers_with_and_without_grammars_of_several_kinds() -> None:
    many = [asked(json_schema_grammar(schema), f"r{index}", 12) for index, schema in enumerate(SCHEMAS)]
    many.append(asked("", "free", 12))
    one = engine()
    for each in many:
        one.engine.handle(Add(each))
    one.run()
    assert one.tokens == {each.key: alone(each) for each in many}


def test_several_threads_fill_the_same_masks() -> None:
    built = tiny_engine(CONFIG, WEIGHTS, grammars=Grammars(vocabulary, num_threads=2))
    many = [asked(LIMITED, f"r{index}", 20, temperature=1.5, seed=index) for index in range(4)]
    assert run(built.engine, built.runner, many) == {each.key: alone(each) for each in many}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this process has one core")
def test_threads_that_fill_masks_share_no_core_that_the_engines_own_keeps_to() -> None:
    cores, before = os.sched_getaffinity(0), tasks()
    built = tiny_engine(CONFIG, WEIGHTS, grammars=Grammars(vocabulary, num_threads=2))
    os.sched_setaffinity(0, {min(cores)})  # as kernels.dispatch.pin_threads does
    try:
        run(built.engine, built.runner, [asked(LIMITED, f"r{index}", 5) for index in range(3)])
        fillers = tasks() - before
        assert fillers and all(os.sched_getaffinity(task) == cores for task in fillers)
    finally:
        os.sched_setaffinity(0, cores)


def tasks() -> set[int]:
    return {int(task) for task in os.listdir("/proc/self/task")}


def test_an_answer_that_is_cut_ends_with_length() -> None:
    one = engine()
    one.engine.handle(Add(asked(LIMITED, max_tokens=4)))
    one.run()
    assert one.finished == {Key("a", 0): FinishReason.LENGTH}
    assert TOKENIZER.decode(one.tokens[Key("a", 0)]) == '{"in'


# --- wherever it goes on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [1, 7, 20])
def test_an_answer_goes_on_from_its_tokens(known: int) -> None:
    """As after a lost worker: another one computes what is known again, and replays the grammar."""
    one = asked(LIMITED, temperature=1.5, seed=9)
    wanted = alone(one)
    assert alone(replace(one, generated_ids=tuple(wanted[:known]))) == wanted[known:]


def test_a_hand_off_carries_all_answers() -> None:
    many = [
        replace(one, sampling=replace(one.sampling, grammar=LIMITED, choice=choice, temperature=1.5, max_tokens=90))
        for choice, one in enumerate(answers(random_prompt(CONFIG, 11, 6), 3))
    ]
    source, target = engine(shuffle_seed=1), engine(shuffle_seed=2)
    handed = hand_over(source, target, many)
    target.run()
    assert {one.key: [*one.generated_ids, *target.tokens[one.key]] for one in handed} == {
        one.key: alone(one) for one in many
    }
    assert len({tuple(tokens) for tokens in target.tokens.values()}) > 1
    source.check_idle()
    target.check_idle()


def test_preempted_answers_are_the_same() -> None:
    many = [asked(LIMITED, f"r{index}", 60, temperature=1.5, seed=index) for index in range(4)]
    one = engine(num_blocks=24)
    for each in many:
        one.engine.handle(Add(each))
    one.run()
    assert one.engine.stats().num_preemptions > 0
    assert one.tokens == {each.key: alone(each) for each in many}
    one.check_idle()


# --- beside other parameters --------------------------------------------------------------------------------------


def test_the_grammar_is_stronger_than_bias_bans_and_minimum() -> None:
    """Complete after one token of the answer: what else is asked for cannot be had."""
    closed = "start: " + json.dumps("a")
    token_id = TOKENIZER.encode("a").ids[0]
    sampling = {"logit_bias": ((token_id, -100.0), (5, 100.0)), "bad_words": ((token_id,),), "min_tokens": 9}
    assert alone(asked(closed, **sampling)) == [token_id, EOS]


def test_bias_and_minimum_choose_among_what_is_allowed() -> None:
    letters, digit = "start: /[0-9]*/", TOKENIZER.encode("7").ids[0]
    tokens = alone(asked(letters, max_tokens=9, logit_bias=((digit, 100.0),), min_tokens=3))
    assert tokens[:3] == [digit] * 3
    assert alone(asked(letters, max_tokens=5, min_tokens=5))[-1] != EOS


def test_a_stop_token_ends_the_answer_inside_the_grammar() -> None:
    colon = TOKENIZER.encode(":").ids[0]
    assert TOKENIZER.decode(alone(asked(LIMITED, stop_token_ids=(colon,)))) == '{"in":'


def test_logprobs_are_the_model_s_own() -> None:
    one = engine()
    one.engine.handle(Add(asked(LIMITED, max_tokens=3, logprobs=2)))
    one.run()
    assert any(output.logprobs[0].rank > 1 for output in one.outputs)


def test_the_mask_is_never_lifted() -> None:
    allowed = np.zeros(8, bool)
    allowed[3] = True
    params = SamplingParams(logit_bias=((5, 100.0),), bad_words=((3,),), repetition_penalty=2.0)
    processed = process(np.zeros(8, np.float32), params, [3, 5], 1, (), allowed)
    assert processed.argmax() == 3 and np.isneginf(processed).sum() == 7


# --- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", ["start: nothing", "no grammar at all", "{", 'start: "' + "x" * 10])
def test_a_grammar_that_fails_ends_its_own_request_only(grammar: str) -> None:
    bad, good = asked(grammar, "bad"), asked(LIMITED, "good", 12)
    one = engine()
    add(one, [bad, bad.sibling(Key("bad.1", 0), 1)])
    one.engine.handle(Add(good))
    one.run()
    assert one.finished[bad.key] is one.finished[Key("bad.1", 0)] is FinishReason.ERROR
    error = next(output.error for output in one.outputs if output.key == bad.key)
    assert error is not None and error.code == "invalid_request" and "grammar" in error.message
    assert one.tokens[good.key] == alone(good)
    one.check_idle()


def test_a_hand_off_whose_grammar_fails_leaves_nothing_behind() -> None:
    one = engine()
    bad = asked("start: nothing", "bad")
    one.engine.handle(Add(bad, handoff=True))
    one.run()
    assert one.finished == {bad.key: FinishReason.ERROR}
    one.engine.handle(Release(bad.key))
    one.engine.handle(Abort(bad.key))
    one.check_idle()


def test_known_tokens_that_break_the_grammar_are_an_error() -> None:
    one = engine()
    one.engine.handle(Add(replace(asked(LIMITED), generated_ids=(1, 2))))
    one.run()
    (output,) = one.outputs
    assert output.error is not None and "doesn't satisfy the grammar" in output.error.message
    one.check_idle()


@pytest.mark.parametrize(
    ("config", "words"), [({"eos_token_ids": ()}, "end-of-sequence"), ({}, "vocabulary")], ids=["no eos", "none"]
)
def test_an_engine_without_what_it_takes_says_so(config: dict[str, Any], words: str) -> None:
    grammars = Grammars(lambda: read_vocabulary(TOKENIZER.to_str(), VOCAB, ())) if config else None
    one = Driven(tiny_engine(CONFIG, WEIGHTS, grammars=grammars))
    one.engine.handle(Add(asked(LIMITED)))
    one.run()
    assert one.outputs[-1].error is not None and words in one.outputs[-1].error.message
    one.check_idle()


def test_going_on_for_ever_is_refused() -> None:
    one = engine()
    one.engine.handle(Add(asked(LIMITED, ignore_eos=True)))
    one.listen()
    assert one.outputs[-1].error is not None and "ignore_eos" in one.outputs[-1].error.message
