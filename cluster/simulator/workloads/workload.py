"""A workload: requests by time of arrival, with their lengths and with what their prompts share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """`pieces` name what successive pieces of the prompt hold: equal names, equal tokens. A prompt without them shares
    nothing with any other."""

    at_s: float
    num_prompt: int  # tokens
    num_output: int  # tokens
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """`arrivals` in order of time; a piece of a prompt has `piece_tokens` tokens, the last one what is left."""

    name: str
    arrivals: tuple[Arrival, ...]
    piece_tokens: int = 512

    @property
    def span_s(self) -> float:
        return self.arrivals[-1].at_s if self.arrivals else 0.0
