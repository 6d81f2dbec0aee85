"""A submission that the engine has: from the queue to its first tokens, or until its blocks leave the outbox."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from engine.types import Key, Submission, TokenOutput


@dataclass(slots=True, eq=False)
class Live:
    """`wanted`: its answers that nobody has ended; `firsts`: their first tokens."""

    submission: Submission
    arrived: float
    given: float
    wanted: list[Key]
    hands_off: bool
    compute_s: float  # of its prompt, as predicted
    started: float | None = None  # when its first chunk was scheduled
    firsts: dict[Key, TokenOutput] = field(default_factory=dict)
    offer: asyncio.Task[None] | None = None
    fetch: asyncio.Task[None] | None = None  # that it waits for, or has waited for
    committed: bool = False  # all computed: it waits in the outbox for its owner
