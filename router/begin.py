"""A Generation out of a prepared body: each prompt is a stream of outputs of its own, with its answers in it."""

from __future__ import annotations

from router.answer import Choice, Generation
from router.api import Generator
from router.asked import Asked
from router.fan_in import fan_in
from router.ledger import Ledger
from router.reader import AnswerReader
from router.schema import ChatBody, CompletionBody
from router.text import Prepared, TextModel


def begin_generation(
    generator: Generator, model: TextModel, body: ChatBody | CompletionBody, prepared: Prepared, ledger: Ledger
) -> Generation:
    """Nothing is computed before its first output is awaited. The index of a choice: that of its prompt times the
    answers to each, and its own among these."""
    num_generated = body.num_generated
    choices: dict[str, Choice] = {}
    streams = []
    for index, request in enumerate(prepared.requests):
        asked = _asked(body, prepared, index)
        answers = (request, *model.siblings_of(request, num_generated))
        for one in answers:
            texts = model.open_stream(body.stop, request.sampling.min_tokens, prepared.reading)
            reader = None if prepared.reading.is_plain else AnswerReader(prepared.reading)
            choices[one.request_id] = Choice(len(choices), texts, asked, reader, prepared.is_silent)
        streams.append(generator.generate(*answers))
    outputs = streams[0] if len(streams) == 1 else fan_in(streams)
    shows_logprobs = isinstance(body, ChatBody) or body.logprobs is not None
    return Generation(
        prepared.requests[0], outputs, generator.cancel, generator.tap, choices, ledger, model.tokenizer.token_text,
        body.num_choices, shows_logprobs,
    )  # fmt: skip


def _asked(body: ChatBody | CompletionBody, prepared: Prepared, index: int) -> Asked:
    echo = prepared.echoes[index] if prepared.echoes else ""
    num_top = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    return Asked(prepared.requests[index], echo, num_top, body.prompt_logprobs)
