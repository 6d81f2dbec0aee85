"""A Sequence: the state of one request in one engine.

Three numbers are kept apart: `tokens` (known), `computed` (positions run through the model) and what is stored in the
block table of each group (all computed positions, or those that a window still reaches).
A step always computes tokens[computed:computed + n]; there is no phase.

Several answers to one prompt are one Sequence until the prompt is computed; then each goes on as a Sequence of its own.
"""

from __future__ import annotations

from collections.abc import Sequence as Siblings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from engine.block_table import BlockTable
from engine.types import FinishReason, Key, Request, TokenLogprob

if TYPE_CHECKING:
    from engine.matching import Matching  # its library is not there on every machine that computes


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    tokens: list[int]  # prompt, then generated
    answers: list[Request] = field(default_factory=list)  # all that its next token is for; `request` names the blocks
    handoff: bool = False  # leaves after its first new token
    computed: int = 0
    tables: list[BlockTable] = field(default_factory=list)  # one for each group; none while it holds no blocks
    hashes: list[bytes] = field(default_factory=list)  # names of the full blocks of `tokens`, from the first
    num_named: int = 0  # of these, how many were recorded with the block manager
    cached_tokens: int = 0  # prompt tokens found in a prefix cache
    announced: bool = False  # of a hand-off: its first chunk was reported
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # as far as they are computed
    matching: Matching | None = None  # how far its grammar is; made when it is first asked for (engine/grammar.py)
    pooled: np.ndarray | None = None  # [hidden]: the sum over its states so far, of an embedding by their mean
    num_overtaken: int = 0  # how often another was admitted before it
    waited_s: float = 0.0  # between its first token and when it could go on here
    paced_from_s: float | None = None  # by the time of steps: when its token 0 was due, by the pace promised to it

    @classmethod
    def from_request(cls, request: Request, handoff: bool = False, siblings: Siblings[Request] = ()) -> Sequence:
        return cls(request, [*request.prompt_ids, *request.generated_ids], [request, *siblings], handoff)

    @property
    def key(self) -> Key:
        return self.request.key

    @property
    def block_ids(self) -> list[int]:
        """All blocks that it holds, group after group."""
        return [block_id for table in self.tables for block_id in table.ids]

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def is_joint(self) -> bool:
        """Will its first token be that of several answers, or of another than the one that names its blocks?"""
        return len(self.answers) > 1 or self.answers[0] is not self.request

    @property
    def is_decoding(self) -> bool:
        num_tokens = len(self.tokens)
        return num_tokens == self.computed + 1 and num_tokens > len(self.request.prompt_ids)

    def finish_reason(self, eos_token_ids: frozenset[int], max_context: int) -> FinishReason | None:
        """Why the sequence ends with its newest token, or None. (Before `min_tokens` no such token is sampled.)"""
        sampling = self.request.sampling
        last = self.tokens[-1]
        if last in sampling.stop_token_ids or (last in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.num_generated >= sampling.max_tokens or len(self.tokens) >= max_context:
            return FinishReason.LENGTH
        return None
