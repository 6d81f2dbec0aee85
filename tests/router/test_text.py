"""A body becomes a Request: prompt, limits, seed; long texts are tokenised off the loop."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from engine.errors import InvalidRequest, ModelNotFound
from engine.types import Request, SamplingParams
from router.schema import ChatBody, CompletionBody
from router.text import DEFAULT_CHAT_TOKENS, DEFAULT_COMPLETION_TOKENS
from tests.router.fakes import BOS, MAX_CONTEXT, ByteTokenizer, chat, completion, text_model


class Witness(ByteTokenizer):
    """Remembers in which thread it worked."""

    def encode(self, text: str, add_special: bool) -> list[int]:
        self.thread = threading.current_thread()
        return super().encode(text, add_special)


async def prepare(body: dict, max_context: int = MAX_CONTEXT) -> Request:
    kind = ChatBody if "messages" in body else CompletionBody
    model = replace(text_model(), max_context=max_context)
    prepared = await model.prepare(kind.model_validate(body), "r1", lambda: 7, timeout_s=60.0)
    (request,) = prepared.requests
    return request


async def test_chat_is_rendered_and_encoded_without_special_tokens() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    request = await prepare(chat() | {"messages": messages})
    assert bytes(request.prompt_ids) == b"[system]be[user]a\nb[assistant]"
    assert (request.request_id, request.timeout_s, request.epoch) == ("r1", 60.0, 0)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("ab", (BOS, 97, 98)), (["ab"], (BOS, 97, 98)), ([97, 98], (97, 98)), ([[97, 98]], (97, 98)), ([0], (0,))],
)
async def test_a_prompt_is_text_or_token_ids(prompt: object, ids: tuple[int, ...]) -> None:
    assert (await prepare(completion(prompt))).prompt_ids == ids


async def test_max_tokens_defaults_to_what_is_left_or_less() -> None:
    assert (await prepare(completion("ab"))).sampling.max_tokens == DEFAULT_COMPLETION_TOKENS
    assert (await prepare(completion("ab"), max_context=10)).sampling.max_tokens == 7
    assert (await prepare(chat(), max_context=10**6)).sampling.max_tokens == DEFAULT_CHAT_TOKENS
    assert (await prepare(chat())).sampling.max_tokens == MAX_CONTEXT - len("[user]hello[assistant]")


async def test_the_context_may_be_filled_to_its_last_token() -> None:
    assert (await prepare(completion("a" * 5, max_tokens=4), max_context=10)).sampling.max_tokens == 4
    with pytest.raises(InvalidRequest, match="leaves 4 of the context of 10") as caught:
        await prepare(completion("a" * 5, max_tokens=5), max_context=10)
    assert caught.value.param == "max_tokens"
    assert (await prepare(completion("a" * 8), max_context=10)).sampling.max_tokens == 1
    with pytest.raises(InvalidRequest, match="10 tokens; the context has 10"):
        await prepare(completion("a" * 9), max_context=10)


async def test_seeds_are_made_where_none_is_given_and_wrapped_where_negative() -> None:
    assert (await prepare(chat())).sampling.seed == 7
    assert (await prepare(chat(seed=0))).sampling.seed == 0
    assert (await prepare(chat(seed=-2))).sampling.seed == 2**64 - 2
    assert (await prepare(chat(seed=2**64 - 1))).sampling.seed == 2**64 - 1


@pytest.mark.parametrize(("asked", "top_k"), [(None, 0), (-1, 0), (0, 0), (5, 5)])
async def test_top_k_is_off_at_0_and_below(asked: int | None, top_k: int) -> None:
    assert (await prepare(chat(top_k=asked))).sampling.top_k == top_k


async def test_an_unknown_model_is_refused_before_anything_is_tokenised() -> None:
    with pytest.raises(ModelNotFound, match="'other' is not served here"):
        await prepare(completion("x" * 10_000) | {"model": "other"})


async def test_long_texts_and_templates_leave_the_loop() -> None:
    witness = Witness()
    model = replace(text_model(), tokenizer=witness, max_context=10**6)
    for length, stays in ((100, True), (10_000, False)):
        await model.prepare(CompletionBody.model_validate(completion("x" * length)), "r1", lambda: 7, timeout_s=60.0)
        assert (witness.thread is threading.current_thread()) is stays
        await model.prepare(ChatBody.model_validate(chat("x" * length)), "r1", lambda: 7, timeout_s=60.0)
        assert witness.thread is not threading.current_thread()


async def test_every_sampling_parameter_reaches_the_engine() -> None:
    asked = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8, "repetition_penalty": 1.2,
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "min_tokens": 2, "max_tokens": 5, "ignore_eos": True,
    }  # fmt: skip
    body = completion("a") | asked | {"logit_bias": {"7": -3, "9": 1.5}, "stop_token_ids": [4, 5]}
    sampling = (await prepare(body)).sampling
    assert {name: getattr(sampling, name) for name in asked} == asked
    assert sampling.logit_bias == ((7, -3.0), (9, 1.5)) and sampling.stop_token_ids == (4, 5)


@pytest.mark.parametrize("absent", [{}, {"min_p": None, "logit_bias": None, "bad_words": None, "stop_token_ids": None}])
async def test_what_is_absent_or_null_is_neutral(absent: dict) -> None:
    sampling = (await prepare(completion("a") | absent)).sampling
    assert sampling == SamplingParams(max_tokens=sampling.max_tokens, seed=7)


async def test_bad_words_are_banned_as_written_and_after_a_space() -> None:
    body = completion("a") | {"bad_words": ["no", " no", "x"]}
    assert (await prepare(body)).sampling.bad_words == tuple(tuple(text.encode()) for text in ("no", " no", "x", " x"))


async def test_prompt_logprobs_of_a_long_prompt_are_refused_before_they_fill_a_message() -> None:
    assert (await prepare(completion("a" * 6000, prompt_logprobs=20), 10**6)).sampling.prompt_logprobs == 20
    with pytest.raises(InvalidRequest, match="prompt_logprobs") as refused:
        await prepare(completion("a" * 6300, prompt_logprobs=20), 10**6)
    assert refused.value.param == "prompt_logprobs"
