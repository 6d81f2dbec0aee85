"""What the text of an answer turns out to be: content, reasoning, or calls of functions, in the order in which it came.

A call begins with a CallStart, and its arguments follow as text, in as many pieces as they were generated in. All parts
of an answer, put together, are its Spoken: the same whether they were sent one by one or as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """`index` counts the answer's calls."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: all of them are JSON, if the model wrote it well."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """A whole answer."""

    content: str
    reasoning: str
    calls: tuple[Call, ...]


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same with neighbours of one kind in one."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            merged[-1] = CallArguments(last.index, last.text + part.text)
        else:
            merged.append(part)
    return tuple(merged)


def spoken(parts: Iterable[Part]) -> Spoken:
    content, reasoning = [], []
    names: list[str] = []
    arguments: list[list[str]] = []
    for part in parts:
        match part:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
    calls = tuple(Call(name, "".join(texts)) for name, texts in zip(names, arguments, strict=True))
    return Spoken("".join(content), "".join(reasoning), calls)
