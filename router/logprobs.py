"""Logprobs in the API's words: for each token of an answer its text, how likely it was, and what was likelier.

Texts are those of single tokens: the parts of a character that several tokens share read U+FFFD, and have no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel

from engine.types import TokenLogprob

UNKNOWN = "\ufffd"


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """One token. `offset` counts the characters of the tokens before it; `top`: (text, logprob). The first token of a
    prompt has no logprob, for it follows nothing."""

    text: str
    logprob: float | None
    offset: int
    top: tuple[tuple[str, float], ...]


def score(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text_of: Callable[[int], str], offset: int
) -> tuple[ScoredToken, ...]:
    """The tokens that have logprobs, the first of them at `offset`."""
    scored = []
    for token_id, one in zip(token_ids, logprobs, strict=False):
        text = text_of(token_id)
        top = tuple((text_of(likely), logprob) for likely, logprob in one.top)
        scored.append(ScoredToken(text, one.logprob, offset, top))
        offset += len(text)
    return tuple(scored)


def score_prompt(
    prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text_of: Callable[[int], str], num_top: int
) -> tuple[ScoredToken, ...]:
    """All tokens of a prompt, with the `num_top` likeliest of each but the first; `logprobs` are of those after it."""
    first = text_of(prompt_ids[0])
    cut = [replace(one, top=one.top[:num_top]) for one in logprobs]
    return (ScoredToken(first, None, 0, ()), *score(prompt_ids[1:], cut, text_of, len(first)))


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(tokens: Sequence[ScoredToken]) -> ChatLogprobs | None:
    """None where none were asked for."""
    content = [
        ChatLogprob(
            token=one.text,
            logprob=one.logprob,
            bytes=_bytes_of(one.text),
            top_logprobs=[TopLogprob(token=text, logprob=lp, bytes=_bytes_of(text)) for text, lp in one.top],
        )
        for one in tokens
        if one.logprob is not None
    ]
    return ChatLogprobs(content=content, refusal=None) if content else None


def completion_logprobs(tokens: Sequence[ScoredToken]) -> CompletionLogprobs | None:
    """None where none were asked for. The chosen token is always among the likely ones."""
    if not tokens:
        return None
    return CompletionLogprobs(
        tokens=[one.text for one in tokens],
        token_logprobs=[one.logprob for one in tokens],
        top_logprobs=[None if one.logprob is None else dict(one.top) | {one.text: one.logprob} for one in tokens],
        text_offset=[one.offset for one in tokens],
    )


class PromptLogprob(BaseModel):
    """As vLLM names it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


def prompt_logprobs(
    prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text_of: Callable[[int], str], num_top: int
) -> PromptLogprobs:
    """By position, from token id to how likely it was, with the `num_top` likeliest; None for the first token, which
    follows nothing."""
    entries: PromptLogprobs = [None]
    for token_id, one in zip(prompt_ids[1:], logprobs, strict=False):
        likely = {
            str(other): PromptLogprob(logprob=logprob, rank=rank, decoded_token=text_of(other))
            for rank, (other, logprob) in enumerate(one.top[:num_top], start=1)
        }
        own = PromptLogprob(logprob=one.logprob, rank=one.rank, decoded_token=text_of(token_id))
        entries.append(likely | {str(token_id): own})
    return entries


def _bytes_of(text: str) -> list[int] | None:
    return None if UNKNOWN in text else list(text.encode())
