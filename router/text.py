"""The text side of the served model: a body becomes an engine Request, tokenised once and here.

1. The model's name is checked, then the prompt is rendered and tokenised (off the loop: chats, and long prompts).
2. Prompt and answer must fit the context; what the client left open is filled in.
3. The answer's ids become text again in a TextStream of the same model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from engine.errors import InvalidRequest, ModelNotFound, Unavailable
from engine.models.pooling import NO_POOLING, Pooling
from engine.types import Key, Request, SamplingParams
from router.chat_prompt import chat_prompt
from router.chat_style import PLAIN_STYLE, ChatStyle, reading_of
from router.errors import shown
from router.grammar import GrammarCheck, InThread, answer_grammar, check_grammar
from router.reader import PLAIN, Reading
from router.schema import ChatBody, CompletionBody, Prompt
from router.text_stream import Detokenizer, TextStream
from router.tools.grammar import after_reasoning, tools_grammar

DEFAULT_CHAT_TOKENS = 1024  # an answer's length when the client names none, if the context has that much left
DEFAULT_COMPLETION_TOKENS = 16  # the API's own default
MAX_PROMPT_LOGPROBS = 2**17  # of one prompt, the likely tokens included: they go to the gateway in one message
LONG_TEXT_CHARS = 4096  # tokenising more than this would hold up the loop
RENDER_TIMEOUT_S = (
    30.0  # what takes longer is given up; templates end by themselves before (engine/models/template_limits)
)


class Tokenizer(Protocol):
    """`engine.models.tokenizer.Tokenizer`, as far as the gateway needs it."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_special: bool) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def token_name(self, token_id: int) -> str: ...

    def special_id(self, token: str) -> int | None:
        """The id of a special token; None for ordinary text."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of a conversation. InvalidRequest when the model's template refuses it, or does not end."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a body asks for: a Request for each of its prompts, with the text that its answers begin with, and how
    answers are to be read. `is_silent`: no token of them is wanted, only the prompt."""

    requests: tuple[Request, ...]
    echoes: tuple[str, ...] = ()
    reading: Reading = PLAIN
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class TextModel:
    """The model served here, as far as text goes. `max_context` bounds prompt and answer together, in tokens.
    `new_detokenizer` gets the marks to be shown even where they are special tokens."""

    name: str
    max_context: int
    tokenizer: Tokenizer
    new_detokenizer: Callable[[Sequence[str]], Detokenizer]
    style: ChatStyle = PLAIN_STYLE
    pooling: Pooling = NO_POOLING
    grammars: GrammarCheck = field(default_factory=InThread)

    async def prepare(
        self, body: ChatBody | CompletionBody, request_id: str, new_seed: Callable[[], int], timeout_s: float
    ) -> Prepared:
        """ModelNotFound, or InvalidRequest naming the field at fault."""
        self.check_name(body.model)
        seed = new_seed() if body.seed is None else body.seed % 2**64
        if isinstance(body, ChatBody):
            prompt_ids, reading = await self._chat_ids(body)
            grammar = await self._chat_grammar(body, reading)
            request = await self._request(body, request_id, prompt_ids, "messages", seed, timeout_s, grammar)
            return Prepared((request,), reading=reading)
        grammar = await answer_grammar(body, self.grammars)
        prompts = [await self._prompt_ids(prompt) for prompt in body.prompt]
        names = [request_id, *(f"{request_id}-{index}" for index in range(1, len(prompts)))]
        named = zip(names, prompts, strict=True)
        requests = [await self._request(body, name, ids, "prompt", seed, timeout_s, grammar) for name, ids in named]
        echoes = tuple(map(self._echo, body.prompt)) if body.echo else ()
        return Prepared(tuple(requests), echoes, is_silent=body.max_tokens == 0)

    async def _request(
        self,
        body: ChatBody | CompletionBody,
        request_id: str,
        prompt_ids: tuple[int, ...],
        field: str,
        seed: int,
        timeout_s: float,
        grammar: str,
    ) -> Request:
        max_tokens = self._max_tokens(body, field, len(prompt_ids))
        self._check_ids(body, max_tokens)
        bad_words = await self._bad_words(body.bad_words or ())
        sampling = _sampling(body, max_tokens, seed, bad_words, grammar)
        _check_prompt_logprobs(sampling.prompt_logprobs, body, len(prompt_ids))
        return Request(request_id, prompt_ids, sampling, timeout_s=timeout_s)

    async def _chat_grammar(self, body: ChatBody, reading: Reading) -> str:
        """Of calls that are demanded or strict, else of the form that the answer is to have, after its reasoning."""
        special_id = self.tokenizer.special_id
        if body.tool_use.is_bound:
            calls = partial(tools_grammar, body.tool_use, self.style.tool_format, special_id)
            grammar = await check_grammar(await asyncio.to_thread(calls), "tools", self.grammars)
        else:
            grammar = await answer_grammar(body, self.grammars)
        return after_reasoning(grammar, reading, special_id)

    def check_name(self, model: str | None) -> None:
        """ModelNotFound for another name than ours; None is whichever is served."""
        if model is not None and model != self.name:
            raise ModelNotFound(f"The model '{shown(model)}' is not served here; '{self.name}' is", param="model")

    def render(self, body: ChatBody, add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. It may take long: never to be called on the loop."""
        chat = chat_prompt(body, self.style)
        return self.tokenizer.render_chat(chat.messages, add_generation_prompt, chat.tools, chat.variables)

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

    def open_stream(self, stops: tuple[str, ...], min_tokens: int = 0, reading: Reading = PLAIN) -> TextStream:
        detokenizer = self.new_detokenizer(() if reading.is_plain else self.style.marks)
        return TextStream(detokenizer, stops, min_tokens, reading.new_counter())

    async def _chat_ids(self, body: ChatBody) -> tuple[tuple[int, ...], Reading]:
        """A template may take long over few messages, so it never runs on the loop."""

        def render() -> tuple[tuple[int, ...], Reading]:
            prompt = self.render(body)
            return tuple(self.tokenizer.encode(prompt, add_special=False)), reading_of(
                body.tool_use, self.style, prompt
            )

        try:
            return await asyncio.wait_for(asyncio.to_thread(render), RENDER_TIMEOUT_S)
        except TimeoutError:
            words = f"the prompt was not rendered and tokenised within {RENDER_TIMEOUT_S:g} s"
            raise Unavailable(words, retry_after_s=1) from None

    async def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        return await _off_loop_if_long(len(prompt), partial(self.ids_of, prompt, "prompt"))

    def ids_of(self, prompt: Prompt, field: str) -> tuple[int, ...]:
        """InvalidRequest for token ids that the model does not have."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=True))
        if max(prompt) >= self.tokenizer.vocab_size:
            raise InvalidRequest(f"'{field}': token ids must be below {self.tokenizer.vocab_size}", param=field)
        return prompt

    def _echo(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        detokenizer = self.new_detokenizer(())
        return detokenizer.push(list(prompt)) + detokenizer.flush()

    def room_after(self, prompt_field: str, num_prompt: int) -> int:
        """Tokens that the context has beside this prompt. InvalidRequest if it has none, or the prompt none."""
        left = self.max_context - num_prompt
        if left < 1:
            words = f"the prompt has {num_prompt} tokens; the context has {self.max_context}, and the answer needs one"
            raise InvalidRequest(f"'{prompt_field}': {words}", param=prompt_field)
        if num_prompt == 0:
            raise InvalidRequest(f"'{prompt_field}': the prompt has no tokens", param=prompt_field)
        return left

    def _max_tokens(self, body: ChatBody | CompletionBody, prompt_field: str, num_prompt: int) -> int:
        left = self.room_after(prompt_field, num_prompt)
        field, asked = _asked_tokens(body)
        if asked is not None and asked > left:
            words = f"{asked} asked for; the prompt of {num_prompt} leaves {left} of the context of {self.max_context}"
            raise InvalidRequest(f"'{field}': {words}", param=field)
        if asked is not None:
            return max(1, asked)  # 0 is one that nobody gets to see
        return min(left, DEFAULT_CHAT_TOKENS if isinstance(body, ChatBody) else DEFAULT_COMPLETION_TOKENS)


async def _off_loop_if_long(num_chars: int, encode: Callable[[], Sequence[int]]) -> tuple[int, ...]:
    return tuple(await asyncio.to_thread(encode) if num_chars > LONG_TEXT_CHARS else encode())


def _check_prompt_logprobs(num_top: int, body: ChatBody | CompletionBody, num_prompt: int) -> None:
    if num_top >= 0 and num_prompt * (1 + num_top) > MAX_PROMPT_LOGPROBS:
        field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        words = f"{num_top} for each of {num_prompt} tokens; at most {MAX_PROMPT_LOGPROBS} in all"
        raise InvalidRequest(f"'{field}': {words}", param=field)


def _asked_tokens(body: ChatBody | CompletionBody) -> tuple[str, int | None]:
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _sampling(
    body: ChatBody | CompletionBody, max_tokens: int, seed: int, bad_words: tuple[tuple[int, ...], ...], grammar: str
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        bad_words=bad_words,
        seed=seed,
        grammar=grammar,
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
        prompt_logprobs=max(-1 if body.prompt_logprobs is None else body.prompt_logprobs, _num_echoed(body)),
    )


def _num_logprobs(body: ChatBody | CompletionBody) -> int:
    """As SamplingParams.logprobs counts: -1 is off. The best of several are told by theirs."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else -1
    if body.logprobs is None:
        return 0 if body.num_generated > body.num_choices else -1
    return body.logprobs


def _num_echoed(body: ChatBody | CompletionBody) -> int:
    """Likely tokens beside each one of a prompt that is echoed with its logprobs; -1: none of it."""
    return body.logprobs if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None else -1
