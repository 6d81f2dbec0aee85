"""The knee: how many prompt tokens a step needs before more of them make each no cheaper. Learnt from the steps.

DistServe's L_m (section 3.1): below it a step is bound by reading weights, and prompts should share it; beyond it they
only wait for each other. Steps are sorted by powers of two of their tokens; of each the average per token is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.step_shape import StepRecord

NEWEST = 0.2  # weight of a step against what was known
FLAT = 1.15  # times the least time per token: cheap enough


class Knee:
    def __init__(self) -> None:
        self._token_s: dict[int, float] = {}  # by the bits of the number of tokens

    def learn(self, records: Iterable[StepRecord]) -> None:
        """Of steps with nothing but prompts."""
        for record in records:
            num_tokens = record.shape.num_chunk_tokens
            if num_tokens and not record.shape.num_decoding:
                token_s, bits = record.step_s / num_tokens, num_tokens.bit_length()
                known = self._token_s.get(bits, token_s)
                self._token_s[bits] = known + NEWEST * (token_s - known)

    def tokens(self, most: int) -> int:
        """At most `most`, which it also is as long as larger steps were always cheaper."""
        if not self._token_s:
            return most
        enough = FLAT * min(self._token_s.values())
        bits = min(bits for bits, token_s in self._token_s.items() if token_s <= enough)
        return min(most, 2**bits) if bits < max(self._token_s) else most
