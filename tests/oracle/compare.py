"""Compare tokens with the oracle's: equal, apart at a near-tie of the oracle's, or wrong. Pure.

Two correct programs add in different orders, so their logits differ by rounding. Where the oracle's best two logits
are closer than NEAR_TIE, either token is right; what follows is then another text, and the comparison ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

NEAR_TIE = 1e-4  # of logits in float32


@dataclass(frozen=True, slots=True)
class Expected:
    """What the oracle chose, and by how much where it was close."""

    tokens: tuple[int, ...]
    min_gap: float  # the smallest distance of its best two logits at any step
    close_gaps: Mapping[int, float] = field(default_factory=dict)  # by step: those below some bound above NEAR_TIE

    def ending_at(self, step: int) -> Expected:
        """The first `step` tokens."""
        gaps = {at: gap for at, gap in self.close_gaps.items() if at < step}
        return Expected(self.tokens[:step], self.min_gap, gaps)

    def starting_at(self, step: int) -> Expected:
        """What is left after the first `step` tokens."""
        gaps = {at - step: gap for at, gap in self.close_gaps.items() if at >= step}
        return Expected(self.tokens[step:], self.min_gap, gaps)


class Verdict(StrEnum):
    EQUAL = "equal"
    NEAR_TIE = "near tie"  # the first difference is where the oracle's best two logits nearly tie
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Comparison:
    verdict: Verdict
    details: str = ""


def compare(expected: Expected, got: Sequence[int]) -> Comparison:
    """Both must be equally long; of different tokens only the first counts."""
    step = next((at for at, pair in enumerate(zip(expected.tokens, got, strict=False)) if pair[0] != pair[1]), None)
    if step is None and len(got) == len(expected.tokens):
        return Comparison(Verdict.EQUAL)
    if step is None:
        return Comparison(Verdict.WRONG, f"{len(got)} tokens instead of {len(expected.tokens)}")
    gap = expected.close_gaps.get(step)
    apart = "clearly apart" if gap is None else f"{gap:.1e} apart"
    told = f"step {step}: {got[step]} instead of {expected.tokens[step]}, the oracle's best two are {apart}"
    if gap is not None and gap < NEAR_TIE:
        return Comparison(Verdict.NEAR_TIE, told)
    return Comparison(Verdict.WRONG, f"{told}; {_around(expected.tokens, got, step)}")


def _around(expected: Sequence[int], got: Sequence[int], step: int) -> str:
    part = slice(max(0, step - 2), step + 4)
    return f"expected ..{list(expected[part])}.., got ..{list(got[part])}.."
