"""Slack: how much of prompts a step may compute beside sequences that were promised a pace. Pure: it counts the time of
the steps, and knows no clock.

1. `pass_time` after each step;
2. `tokens_beside` before each: the tightest promise among those that decode bounds the step's time, and so its chunks.
   A sequence has a schedule: a token every `tpot_s` from its first on. One ahead of it lends up to one `tpot_s` to a
   step, which may so take twice its target; one behind gets back up to half of one, so that it catches up;
3. where nothing fits for seven steps, the next one takes a minimal chunk all the same: prompts always progress.
Without a promise there is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

from engine.pace import Pace
from engine.sequence import Sequence
from engine.types import UNBOUNDED

BORROW, RETURN = 1.0, 0.5  # of a tpot_s: most that a step may take beyond it, and must stay below it
HEADROOM = 0.9  # of the time that is there is planned with: predictions err
MIN_CHUNK = 16  # tokens
EVERY = 8  # steps


class Slack:
    def __init__(self) -> None:
        self.pace = Pace()
        self.elapsed_s = 0.0  # that steps took together
        self._num_without = 0  # steps since the last one with a chunk, while prompts waited

    def pass_time(self, step_s: float) -> None:
        self.elapsed_s += step_s

    def limit_s(self, decoding: Sequences[Sequence]) -> float:
        """How long the next step may take by what was promised to those that decode; infinite: nothing was."""
        promised = [sequence for sequence in decoding if sequence.request.service.tpot_s < math.inf]
        return min(map(self._allowed_s, promised), default=math.inf)

    def tokens_beside(self, decoding: Sequences[Sequence], prompt: Sequence | None, most: int) -> int:
        """Tokens of prompts in the next step, at most `most`; `prompt`: the first whose turn it is, if there is any."""
        limit_s = self.limit_s(decoding)
        if math.isinf(limit_s) or prompt is None:
            self._num_without = 0
            return most
        fitting = self._fitting(decoding, limit_s, prompt.computed, most)
        self._num_without += 1
        least = min(MIN_CHUNK, most)
        if fitting < least and self._num_without >= EVERY:
            fitting = least
        if fitting < least:  # what is left of a prompt may be less
            fitting = fitting if fitting >= prompt.num_pending else 0
        if fitting:
            self._num_without = 0
        return min(fitting, most)

    def report(self, decoding: Sequences[Sequence], most: int) -> int:
        """Tokens that a step would take of a new prompt as things are, at most `most`; UNBOUNDED: without a promise."""
        limit_s = self.limit_s(decoding)
        return UNBOUNDED if math.isinf(limit_s) else self._fitting(decoding, limit_s, 0, most)

    def _fitting(self, decoding: Sequences[Sequence], limit_s: float, num_before: int, most: int) -> int:
        num_context = sum(sequence.computed + 1 for sequence in decoding)
        return self.pace.chunk_within(HEADROOM * limit_s, len(decoding), num_context, num_before, most)

    def _allowed_s(self, sequence: Sequence) -> float:
        """Until its next token is due, within the bounds of what may be lent and taken back."""
        tpot_s = sequence.request.service.tpot_s
        if sequence.paced_from_s is None:
            sequence.paced_from_s = self.elapsed_s - sequence.waited_s - tpot_s * sequence.num_generated
        due_in_s = sequence.paced_from_s + tpot_s * (sequence.num_generated + 1) - self.elapsed_s
        return min(max(due_in_s, (1 - RETURN) * tpot_s), (1 + BORROW) * tpot_s)


@dataclass(frozen=True, slots=True)
class Paced:
    """Sequences that decode together, or will: how many, the positions that they read, and what each was promised."""

    num: int
    num_context: int
    tpot_s: float

    @classmethod
    def of(cls, sequence: Sequence) -> Paced:
        return cls(1, sequence.computed + 1, sequence.request.service.tpot_s)


def broken_promise(pace: Pace, others: Sequences[Paced], new: Paced) -> str | None:
    """Which pace, kept by a step without the others or without `new`, would not be with all of them; None if none
    would, where it is not known, or where `new` was promised nothing: that is refused for lack of room only."""
    num, num_context = sum(one.num for one in others), sum(one.num_context for one in others)
    now_s = pace.decode_s(num, num_context) if num else 0.0
    alone_s = pace.decode_s(new.num, new.num_context)
    then_s = pace.decode_s(num + new.num, num_context + new.num_context)
    if math.isinf(new.tpot_s) or now_s is None or alone_s is None or then_s is None:
        return None
    broken = [one.tpot_s for one in others if now_s <= one.tpot_s < then_s]
    broken += [new.tpot_s] if others and alone_s <= new.tpot_s < then_s else []
    return f"a step would take {then_s:.4f} s, and {min(broken):g} s were promised" if broken else None
