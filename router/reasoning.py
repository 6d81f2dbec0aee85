"""Reasoning: the text between the marks that a model puts around it, and how many tokens it took.

1. An answer begins with reasoning if its first mark is the opening one, or if the prompt's end has it already.
2. Reasoning goes on to the closing mark, or to the end of an answer that is cut before. New lines beside marks are
   dropped with them.
3. A token is one of reasoning if some of its text lies between the marks (or, having none, it came there). Marks do not
   count, as vLLM counts.

The text is split after stop strings were cut off; tokens are counted before, as far as usage counts them at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from router.parts import Content, Part, Reasoning

NEWLINES = "\r\n"


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    opener: str
    closer: str


STYLES: Mapping[str, ReasoningMarks] = {
    "think": ReasoningMarks("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM 3 and many more
    "bracket": ReasoningMarks("[THINK]", "[/THINK]"),  # Magistral
    "thinking": ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    "seed": ReasoningMarks("<seed:think>", "</seed:think>"),  # Seed OSS
}


def reasoning_marks_of(template: str | None) -> ReasoningMarks | None:
    """The marks that a chat template's text shows; None where it shows none."""
    text = template or ""
    return next((marks for marks in STYLES.values() if marks.closer in text), None)


def opens_reasoning(prompt: str, marks: ReasoningMarks) -> bool:
    """Does the answer go on inside of reasoning that the prompt has opened?"""
    return prompt.rstrip().endswith(marks.opener)


class _Phase(Enum):
    BEGINNING = auto()  # the opening mark may come
    OPENED = auto()  # behind the opening mark, before the reasoning's first character
    INSIDE = auto()
    AFTER = auto()  # behind the closing mark, before the content's first character
    OUTSIDE = auto()


class ReasoningSplitter:
    """Tells reasoning from content in a text that comes in pieces, however it was cut."""

    def __init__(self, marks: ReasoningMarks, is_open: bool) -> None:
        """`is_open`: the prompt ended with the opening mark; a second one, at once, is no text either."""
        self._marks = marks
        self._is_open = is_open
        self._phase = _Phase.BEGINNING
        self._held = ""

    def push(self, text: str) -> tuple[Part, ...]:
        self._held += text
        if self._phase is _Phase.BEGINNING:
            self._begin()
        self._skip_newlines(_Phase.OPENED, _Phase.INSIDE)
        parts = self._reason() if self._phase is _Phase.INSIDE else []
        self._skip_newlines(_Phase.AFTER, _Phase.OUTSIDE)
        if self._phase is _Phase.OUTSIDE and self._held:
            parts.append(Content(self._held))
            self._held = ""
        return tuple(parts)

    def flush(self) -> tuple[Part, ...]:
        """At the end of the answer: what was held back is what it looks like."""
        held, self._held = self._held, ""
        is_reasoning = self._phase is _Phase.INSIDE or (self._phase is _Phase.BEGINNING and self._is_open)
        return () if not held else (Reasoning(held),) if is_reasoning else (Content(held),)

    def _begin(self) -> None:
        end = _opening(self._held, self._marks.opener)
        if end is None:
            self._phase = _Phase.OPENED if self._is_open else _Phase.OUTSIDE
        elif end > 0:
            self._held = self._held[end:]
            self._phase = _Phase.OPENED

    def _skip_newlines(self, phase: _Phase, following: _Phase) -> None:
        if self._phase is phase:
            self._held = self._held.lstrip(NEWLINES)
            self._phase = following if self._held else phase

    def _reason(self) -> list[Part]:
        text, mark, rest = self._held.partition(self._marks.closer)
        if mark:
            text = text.rstrip(NEWLINES)
            self._held, self._phase = rest, _Phase.AFTER
        else:
            certain = len(text) - _num_doubtful(text, self._marks.closer)
            text, self._held = text[:certain], text[certain:]
        return [Reasoning(text)] if text else []


class ReasoningCounter:
    """Counts an answer's reasoning tokens, one token after another."""

    def __init__(self, marks: ReasoningMarks, is_open: bool) -> None:
        self.num_tokens = 0
        self._marks = marks
        self._is_open = is_open
        self._phase = _Phase.BEGINNING
        self._text = ""  # that may still contain a mark
        self._offset = 0  # of its end
        self._tokens: deque[tuple[int, int]] = deque()  # where those begin and end that may not count

    def push(self, text: str) -> None:
        """The text that one more token completed."""
        if self._phase is _Phase.OUTSIDE:
            return
        self._tokens.append((self._offset, self._offset + len(text)))
        self._offset += len(text)
        self._text += text
        self.num_tokens += self._phase is _Phase.INSIDE or self._is_open
        if self._phase is _Phase.BEGINNING:
            self._begin()
        if self._phase is _Phase.INSIDE:
            self._look_for_end()

    def _begin(self) -> None:
        end = _opening(self._text, self._marks.opener)
        if end is None:
            self._phase = _Phase.INSIDE if self._is_open else _Phase.OUTSIDE
        elif end > 0:
            self.num_tokens = sum(after > end for _, after in self._tokens)
            self._tokens = deque((max(start, end), after) for start, after in self._tokens if after > end)
            self._text = self._text[end:]
            self._phase = _Phase.INSIDE

    def _look_for_end(self) -> None:
        found = self._text.find(self._marks.closer)
        if found >= 0:
            end = self._offset - len(self._text) + found
            self.num_tokens -= sum(start >= end for start, _ in self._tokens)
            self._phase = _Phase.OUTSIDE
            return
        self._text = self._text[-len(self._marks.closer) + 1 :]
        first_doubtful = self._offset - len(self._text)
        while self._tokens and self._tokens[0][0] < first_doubtful:
            self._tokens.popleft()


def _opening(text: str, opener: str) -> int | None:
    """Where the opening mark at the text's beginning ends; 0 while it may still come, None if it does not."""
    mark = text.lstrip()
    if opener and mark.startswith(opener):
        return len(text) - len(mark) + len(opener)
    return 0 if opener.startswith(mark) and len(mark) < max(1, len(opener)) else None


def _num_doubtful(text: str, closer: str) -> int:
    """How long the text's end is that may belong to the closing mark, with the new lines before it."""
    sizes = range(min(len(closer) - 1, len(text)), 0, -1)
    size = next((size for size in sizes if closer.startswith(text[-size:])), 0)
    before = text[: len(text) - size]
    return size + len(before) - len(before.rstrip(NEWLINES))
