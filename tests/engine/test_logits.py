"""Every sampling parameter against transformers' own processors and warpers, and against what an engine samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from engine.logits import process
from engine.sampler import sample
from engine.types import Add, Request, Sampled, SamplingParams, TokenOutput
from tests.engine.tiny import (
    hf_model,
    random_prompt,
    random_weights,
    request,
    run,
    tiny_config,
    tiny_engine,
    turn,
)

VOCAB = 40
PROMPT, ANSWER = [3, 7, 7, 12, 30], [5, 9, 5, 5]
TOKENS = [*PROMPT, *ANSWER]
EOS = (1, 2)
NUM_DRAWS = 4000


class PresenceAndFrequency(LogitsProcessor):
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, as the OpenAI API documents it."""

    def __init__(self, presence: float, frequency: float, num_prompt: int) -> None:
        self.presence, self.frequency, self.num_prompt = presence, frequency, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.nn.functional.one_hot(input_ids[:, self.num_prompt :], scores.shape[1]).sum(dim=1)
        return scores - counts * self.frequency - (counts > 0) * self.presence


def theirs(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities [vocab] float64 after transformers' processors, in the order that we document."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(PresenceAndFrequency(params.presence_penalty, params.frequency_penalty, len(PROMPT)))
    if params.bad_words:
        chain.append(NoBadWordsLogitsProcessor([list(words) for words in params.bad_words]))
    ends = [*params.stop_token_ids, *(() if params.ignore_eos else EOS)]
    if params.min_tokens and ends:
        chain.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, ends))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        chain.append(TypicalLogitsWarper(params.typical_p))
    scores = chain(torch.LongTensor([TOKENS]), torch.FloatTensor(logits)[None])
    return torch.softmax(scores[0].double(), dim=-1).numpy()


def random_logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)


def draw(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """How often each token is chosen, over as many seeds."""
    processed = process(logits, params, TOKENS, len(PROMPT), EOS)
    chosen = [sample(processed, replace(params, seed=seed), len(TOKENS)) for seed in range(NUM_DRAWS)]
    return np.bincount(chosen, minlength=VOCAB)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """The statistic over tokens expected at least five times (the rest in one bin), and its degrees of freedom."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    terms = [(o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0]
    return float(sum(terms)), len(terms) - 1


def quantile(degrees: int) -> float:
    """The 0.9999 quantile of chi-square, by Wilson and Hilferty's approximation."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * spread**0.5) ** 3


CASES = {
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.15),
    "typical_p": SamplingParams(typical_p=0.6),
    "repetition_penalty": SamplingParams(repetition_penalty=1.8),
    "presence_penalty": SamplingParams(presence_penalty=1.5),
    "frequency_penalty": SamplingParams(frequency_penalty=0.9),
    "negative penalties": SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.5),
    "logit_bias": SamplingParams(logit_bias=((4, 3.0), (5, -100.0))),
    "bad_words": SamplingParams(bad_words=((8,), (5, 11), (9, 5, 13))),
    "min_tokens": SamplingParams(min_tokens=6, stop_token_ids=(20, 21)),
    "min_tokens, ignore_eos": SamplingParams(min_tokens=6, stop_token_ids=(20,), ignore_eos=True),
    "min_tokens reached": SamplingParams(min_tokens=4, stop_token_ids=(20,)),
    "all": SamplingParams(
        temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, typical_p=0.9, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias=((4, 2.0),), bad_words=((8,),), min_tokens=9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sampled_frequencies_are_those_of_transformers_processors(name: str) -> None:
    logits, params = random_logits(1), CASES[name]
    probabilities = theirs(logits, params)
    counts = draw(logits, params)
    assert not counts[probabilities == 0].any(), "a token that is ruled out was chosen"
    statistic, degrees = chi_square(counts, probabilities)
    assert statistic < quantile(degrees)


def test_the_chi_square_test_notices_a_wrong_distribution() -> None:
    logits = random_logits(1)
    counts = draw(logits, CASES["temperature"])
    statistic, degrees = chi_square(counts, theirs(logits, SamplingParams(temperature=0.7)))
    assert statistic > quantile(degrees)


def token_ids() -> st.SearchStrategy[int]:
    return st.integers(0, VOCAB - 1)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    ids = st.lists(token_ids(), max_size=3).map(tuple)
    words = st.lists(st.lists(token_ids(), min_size=1, max_size=3).map(tuple), max_size=3, unique=True).map(tuple)
    biases = st.dictionaries(token_ids(), st.floats(-5, 5).filter(bool), max_size=3)
    return SamplingParams(
        min_tokens=draw(st.integers(0, 6)), temperature=draw(st.floats(0.3, 2)), top_k=draw(st.integers(0, VOCAB)),
        top_p=draw(st.floats(0.1, 1)), min_p=draw(st.sampled_from([0, 0.05, 0.3])),
        typical_p=draw(st.sampled_from([1.0, 0.9, 0.4])), repetition_penalty=draw(st.floats(0.6, 2)),
        presence_penalty=draw(st.floats(-2, 2)), frequency_penalty=draw(st.floats(-2, 2)),
        logit_bias=tuple(draw(biases).items()), bad_words=draw(words), ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(ids),
    )  # fmt: skip


@settings(max_examples=150)
@given(params(), st.integers(0, 1000), st.integers(0, 2**64 - 1))
def test_no_combination_chooses_what_transformers_rules_out(params: SamplingParams, row: int, seed: int) -> None:
    logits = random_logits(row)
    probabilities = theirs(logits, params)
    processed = process(logits, params, TOKENS, len(PROMPT), EOS)
    chosen = sample(processed, replace(params, seed=seed), len(TOKENS))
    assert probabilities[chosen] > 1e-9 or probabilities.max() < 1e-9
    greedy = sample(processed, replace(params, temperature=0.0), len(TOKENS))
    untruncated = theirs(logits, replace(params, typical_p=1.0))  # which may rule the most likely token out
    assert untruncated[greedy] == pytest.approx(untruncated.max(), rel=1e-5)


def test_neutral_parameters_change_nothing_and_copy_nothing() -> None:
    logits = random_logits(3)
    assert process(logits, SamplingParams(top_k=3, temperature=0.5), TOKENS, len(PROMPT), EOS) is logits
    before = logits.copy()
    process(logits, CASES["all"], TOKENS, len(PROMPT), EOS)
    assert np.array_equal(logits, before), "the model's logits are left alone"


def test_when_everything_is_banned_the_model_decides() -> None:
    logits = random_logits(3)
    banned = SamplingParams(bad_words=tuple((token_id,) for token_id in range(VOCAB)))
    assert process(logits, banned, TOKENS, len(PROMPT), EOS) is logits


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(logit_bias=((VOCAB, 5.0),), bad_words=((VOCAB,),), min_tokens=9, stop_token_ids=(VOCAB,))
    logits = random_logits(3)
    assert np.array_equal(process(logits, params, TOKENS, len(PROMPT), ()), logits)


# --- through an engine ----------------------------------------------------------------------------------------

CONFIG = tiny_config(eos_token_ids=(1,))
WEIGHTS = random_weights(CONFIG, seed=9)
BUSY = {
    "temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_p": 0.01,
    "typical_p": 0.95, "logit_bias": ((5, 1.5), (6, -4.0)), "bad_words": ((7,), (5, 8)), "min_tokens": 10,
}  # fmt: skip


def requests() -> list[Request]:
    return [
        request(str(index), random_prompt(CONFIG, 9 + 5 * index, index), max_tokens=24, seed=index, **BUSY)
        for index in range(4)
    ]


@pytest.mark.parametrize(
    "limits", [{"prefill_chunk": 1}, {"prefill_chunk": 7}, {"max_batch_seqs": 2}, {"num_blocks": 20}], ids=str
)
def test_a_seeded_stream_is_the_same_alone_in_a_batch_in_chunks_and_after_preemption(limits: dict[str, Any]) -> None:
    alone = tiny_engine(CONFIG, WEIGHTS)
    wanted = {one.key: run(alone.engine, alone.runner, [one])[one.key] for one in requests()}
    built = tiny_engine(CONFIG, WEIGHTS, **limits)
    assert run(built.engine, built.runner, requests()) == wanted
    if "num_blocks" in limits:
        assert built.engine.stats().num_preemptions > 0
    assert all(len(tokens) >= 10 and 7 not in tokens for tokens in wanted.values())


def outputs_of(one: Request, **limits: Any) -> list[TokenOutput]:
    built = tiny_engine(CONFIG, WEIGHTS, **limits)
    built.engine.handle(Add(one))
    found: list[TokenOutput] = []
    while outputs := turn(built.engine, built.runner):
        found += [output for part in outputs for output in part.tokens]
    return found


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_logprobs_are_those_of_the_models_own_distribution(chunk: int) -> None:
    """Of the prompt and of the answer, however it is chunked, and before any bias or penalty."""
    asked = request("a", random_prompt(CONFIG, 21, 0), 6, logprobs=3, prompt_logprobs=2, logit_bias=((9, 50.0),))
    outputs = outputs_of(asked, prefill_chunk=chunk)
    tokens = [*asked.prompt_ids, *(token_id for output in outputs for token_id in output.token_ids)]
    with torch.no_grad():
        rows = hf_model(CONFIG, WEIGHTS)(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    told = [*outputs[0].prompt_logprobs, *(one for output in outputs for one in output.logprobs)]
    assert len(outputs[0].prompt_logprobs) == 20 and not outputs[1].prompt_logprobs
    assert len(told) == len(tokens) - 1
    for row, token_id, one in zip(rows, tokens[1:], told, strict=False):
        assert one.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        assert one.rank == 1 + int((row > row[token_id]).sum())
        ids = row.topk(len(one.top)).indices.tolist()
        assert [token for token, _ in one.top] == ids
    assert [len(one.top) for one in told] == [2] * 20 + [3] * 6


def test_prompt_logprobs_are_complete_although_the_prompt_is_cached() -> None:
    built = tiny_engine(CONFIG, WEIGHTS)
    prompt = random_prompt(CONFIG, 32, 0)
    run(built.engine, built.runner, [request("warm", prompt)])
    built.engine.handle(Add(request("a", prompt, 2, prompt_logprobs=0)))
    outputs = [output for part in turn(built.engine, built.runner) or () for output in part.tokens]
    assert len(outputs[0].prompt_logprobs) == 31 and outputs[0].cached_tokens == 0


def test_nothing_is_told_where_no_logprobs_were_asked_for() -> None:
    assert all(output.logprobs == output.prompt_logprobs == () for output in outputs_of(request("a", (3, 4), 4)))
    assert Sampled().logprobs == ()
