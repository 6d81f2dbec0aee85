"""The text side of the served model: a body becomes an engine Request, tokenised once and here.

1. The model's name is checked, then the prompt is rendered and tokenised (off the loop when it is long).
2. Prompt and answer must fit the context; what the client left open is filled in.
3. The answer's ids become text again in a TextStream of the same model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from engine.errors import InvalidRequest, ModelNotFound
from engine.types import Key, Request, SamplingParams
from router.errors import shown
from router.schema import ChatBody, CompletionBody
from router.text_stream import Detokenizer, TextStream

DEFAULT_CHAT_TOKENS = 1024  # an answer's length when the client names none, if the context has that much left
DEFAULT_COMPLETION_TOKENS = 16  # the API's own default
MAX_PROMPT_LOGPROBS = 2**17  # of one prompt, the likely tokens included: they go to the gateway in one message
LONG_TEXT_CHARS = 4096  # tokenising more than this would hold up the loop


class Tokenizer(Protocol):
    """`engine.models.tokenizer.Tokenizer`, as far as the gateway needs it."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special: bool) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def render_chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. InvalidRequest when the model's template refuses it."""
        ...


@dataclass(frozen=True, slots=True)
class TextModel:
    """The model served here, as far as text goes. `max_context` bounds prompt and answer together, in tokens."""

    name: str
    max_context: int
    tokenizer: Tokenizer
    new_detokenizer: Callable[[], Detokenizer]

    async def prepare(
        self, body: ChatBody | CompletionBody, request_id: str, new_seed: Callable[[], int], timeout_s: float
    ) -> Request:
        """The Request that a body asks for. ModelNotFound, or InvalidRequest naming the field at fault."""
        if body.model != self.name:
            raise ModelNotFound(f"The model '{shown(body.model)}' is not served here; '{self.name}' is", param="model")
        if isinstance(body, ChatBody):
            field, prompt_ids = "messages", await self._chat_ids(body)
        else:
            field, prompt_ids = "prompt", await self._prompt_ids(body.prompt)
        max_tokens = self._max_tokens(body, field, len(prompt_ids))
        seed = new_seed() if body.seed is None else body.seed % 2**64
        self._check_ids(body, max_tokens)
        _check_prompt_logprobs(body, len(prompt_ids))
        sampling = replace(_sampling(body, max_tokens, seed), bad_words=await self._bad_words(body.bad_words or ()))
        return Request(request_id, prompt_ids, sampling, timeout_s=timeout_s)

    def siblings_of(self, request: Request, num_choices: int) -> tuple[Request, ...]:
        """The other answers to the same prompt: same parameters, other noise."""
        names = ((choice, f"{request.request_id}.{choice}") for choice in range(1, num_choices))
        return tuple(request.sibling(Key(name, 0), choice) for choice, name in names)

    def _check_ids(self, body: ChatBody | CompletionBody, max_tokens: int) -> None:
        """InvalidRequest for token ids that the model does not have, and for a minimum above the maximum."""
        limit = self.tokenizer.vocab_size
        for token_id in body.logit_bias:
            if token_id >= limit:
                field = f"logit_bias.{token_id}"
                raise InvalidRequest(f"'{field}': token ids must be below {limit}", param=field)
        for index, token_id in enumerate(body.stop_token_ids or ()):
            if token_id >= limit:
                field = f"stop_token_ids.{index}"
                raise InvalidRequest(f"'{field}': token ids must be below {limit}", param=field)
        if (body.min_tokens or 0) > max_tokens:
            raise InvalidRequest(
                f"'min_tokens': {body.min_tokens} exceeds max_tokens, {max_tokens}", param="min_tokens"
            )

    async def _bad_words(self, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Each text as it is and after a space, which most vocabularies tell apart; in ids, without repeats."""
        forms = [form for text in texts for form in (text, f" {text.lstrip()}")]
        num_chars = sum(map(len, forms))
        encode = partial(self.tokenizer.encode, add_special=False)
        ids = [await _off_loop_if_long(num_chars, partial(encode, form)) for form in forms]
        return tuple(dict.fromkeys(filter(None, ids)))

    def open_stream(self, stops: tuple[str, ...], min_tokens: int = 0) -> TextStream:
        return TextStream(self.new_detokenizer(), stops, min_tokens)

    async def _chat_ids(self, body: ChatBody) -> tuple[int, ...]:
        messages = [{"role": _known_role(message.role), "content": message.text} for message in body.messages]

        def encode() -> list[int]:
            return self.tokenizer.encode(self.tokenizer.render_chat(messages), add_special=False)

        return await _off_loop_if_long(sum(len(message["content"]) for message in messages), encode)

    async def _prompt_ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await _off_loop_if_long(len(prompt), lambda: self.tokenizer.encode(prompt, add_special=True))
        if max(prompt) >= self.tokenizer.vocab_size:
            raise InvalidRequest(f"'prompt': token ids must be below {self.tokenizer.vocab_size}", param="prompt")
        return prompt

    def _max_tokens(self, body: ChatBody | CompletionBody, prompt_field: str, num_prompt: int) -> int:
        left = self.max_context - num_prompt
        if left < 1:
            words = f"the prompt has {num_prompt} tokens; the context has {self.max_context}, and the answer needs one"
            raise InvalidRequest(f"'{prompt_field}': {words}", param=prompt_field)
        if num_prompt == 0:
            raise InvalidRequest(f"'{prompt_field}': the prompt has no tokens", param=prompt_field)
        field, asked = _asked_tokens(body)
        if asked is not None and asked > left:
            words = f"{asked} asked for; the prompt of {num_prompt} leaves {left} of the context of {self.max_context}"
            raise InvalidRequest(f"'{field}': {words}", param=field)
        return asked or min(left, DEFAULT_CHAT_TOKENS if isinstance(body, ChatBody) else DEFAULT_COMPLETION_TOKENS)


async def _off_loop_if_long(num_chars: int, encode: Callable[[], list[int]]) -> tuple[int, ...]:
    return tuple(await asyncio.to_thread(encode) if num_chars > LONG_TEXT_CHARS else encode())


def _check_prompt_logprobs(body: ChatBody | CompletionBody, num_prompt: int) -> None:
    if body.prompt_logprobs is not None and num_prompt * (1 + body.prompt_logprobs) > MAX_PROMPT_LOGPROBS:
        words = f"{body.prompt_logprobs} for each of {num_prompt} tokens; at most {MAX_PROMPT_LOGPROBS} in all"
        raise InvalidRequest(f"'prompt_logprobs': {words}", param="prompt_logprobs")


def _known_role(role: str) -> str:
    """Chat templates know the developer by the older name."""
    return "system" if role == "developer" else role


def _asked_tokens(body: ChatBody | CompletionBody) -> tuple[str, int | None]:
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _sampling(body: ChatBody | CompletionBody, max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        min_p=body.min_p or 0.0,
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple(body.logit_bias.items()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=_num_logprobs(body),
        prompt_logprobs=-1 if body.prompt_logprobs is None else body.prompt_logprobs,
    )


def _num_logprobs(body: ChatBody | CompletionBody) -> int:
    """As SamplingParams.logprobs counts: -1 is off."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else -1
    return -1 if body.logprobs is None else body.logprobs
