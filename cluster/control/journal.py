"""The journal: every decision with all that it was made from, a line of JSON each, so that it can be made again.

1. a line holds what was looked at (a Look), what was decided, and what came of earlier decisions;
2. now and then, and at the beginning, it holds what was remembered, too (a Checkpoint): who reads begins there;
3. `replay` looks at the same again, decides again, and says where that came to something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.control.flip import Flipped
from cluster.control.planner import Memory, Plan, plan
from cluster.control.rules import ControllerConfig
from cluster.control.window import Kept, Look, Window
from engine.errors import ConfigError

CHECKPOINT_EVERY = 100  # lines


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Before the line's look."""

    rules: ControllerConfig
    memory: Memory
    kept: Kept


@dataclass(frozen=True, slots=True)
class Line:
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")
    look: Look
    plan: Plan
    flipped: tuple[Flipped, ...] = ()  # what came of flips since the last line
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """One line, and what the same planner makes of it now."""

    line: Line
    again: Plan

    @property
    def is_same(self) -> bool:
        return self.line.plan == self.again


_LINES = TypeAdapter(Line)


class Journal:
    """`write` gets lines without their ends."""

    def __init__(self, rules: ControllerConfig, write: Callable[[str], None]) -> None:
        self._rules = rules
        self._write = write
        self._num_lines = 0

    def note(self, look: Look, decided: Plan, flipped: Sequence[Flipped], memory: Memory, kept: Kept) -> None:
        """`memory` and `kept` are of before the look."""
        is_due = self._num_lines % CHECKPOINT_EVERY == 0
        checkpoint = Checkpoint(self._rules, memory, kept) if is_due else None
        self._write(encode(Line(look, decided, tuple(flipped), checkpoint)))
        self._num_lines += 1


def encode(line: Line) -> str:
    return _LINES.dump_json(line).decode()


def decode(text: str, where: str = "") -> Line:
    """Raises ConfigError."""
    try:
        return _LINES.validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{where}is no line of a journal: {path}: {fault['msg']}") from None


def replay(lines: Iterable[Line]) -> Iterator[Replayed]:
    """From the first checkpoint on."""
    window: Window | None = None
    rules, memory = ControllerConfig(), Memory()
    for line in lines:
        if line.checkpoint is not None:
            rules, memory = line.checkpoint.rules, line.checkpoint.memory
            window = Window(rules.window_s + rules.bucket_s, rules.stale_s, line.checkpoint.kept)
        if window is None:
            continue
        again, memory = plan(window.after(line.look), memory, rules)
        yield Replayed(line, again)
