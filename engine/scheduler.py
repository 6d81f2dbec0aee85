"""The scheduler: which sequences compute how many tokens in the next step. Knows blocks by id, no tensors.

A step, under a token budget:
1. sequences that decode (one pending token each), oldest first; a sequence short of blocks preempts the youngest,
   which gives up its blocks and is computed again later; the oldest always goes on, also while it is in its prompt;
2. sequences in the middle of their prompt, a chunk each: the oldest, so that it always goes on, then those with no
   more than a chunk left;
3. waiting ones, when all blocks of their known tokens fit, so that a prefill never stalls half way. First come first
   served, but a prompt that the step cannot hold whole is overtaken by those behind it that it can: a few very long
   prompts do not hold up many short ones. Nobody is overtaken more than `max_overtaken` times;
4. what is left goes to the other long prompts under way.
Beside sequences that were promised a pace, prompts get what fits into the step's time (engine/slack.py).
Hand-offs are never preempted: a puller may be reading their blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Forks
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from itertools import compress
from operator import not_

from engine.block_manager import BlockManager
from engine.planes import Group
from engine.sequence import Sequence
from engine.sequence_blocks import SequenceBlocks
from engine.slack import Slack
from engine.step_shape import Chunk, StepShape
from engine.types import Key


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute `sequence.tokens[start:start + num_new]`; sample after the last of them if `samples`."""

    sequence: Sequence
    start: int
    num_new: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `copies` are (from, to) block ids to be copied before anything is written."""

    scheduled: tuple[Scheduled, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new for item in self.scheduled)

    @property
    def shape(self) -> StepShape:
        num_decoding, num_context, chunks = 0, 0, list[Chunk]()
        for item in self.scheduled:
            if item.sequence.is_decoding:
                num_decoding += 1
                num_context += item.start + item.num_new
            else:
                chunks.append(Chunk(item.start, item.num_new))
        return StepShape(tuple(chunks), num_decoding, num_context)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Units are tokens and sequences; `lookahead` is the most draft tokens verified beside one pending token: as many
    of them as the sequence's blocks have room for."""

    block_size: int
    max_batch_tokens: int
    max_batch_seqs: int
    prefill_chunk: int
    prefix_cache: bool = True
    lookahead: int = 0
    groups: tuple[Group, ...] = (Group((0,)),)
    max_overtaken: int = 64  # 0: first come, first served


class Scheduler:
    """Owns the waiting and running sequences and their blocks. One that waits holds no blocks."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, hash_key: bytes) -> None:
        self.limits = limits
        self.holdings = SequenceBlocks(blocks, limits.groups, limits.block_size, limits.prefix_cache, hash_key)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.slack = Slack()
        self._max_tokens = limits.max_batch_tokens  # of the step that is being picked

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Take in a sequence that holds computed blocks. It is the youngest: without a seat in the batch it waits
        for one in `running`, where others can preempt it."""
        self.running.append(sequence)

    def fork(self, source: Sequence, forks: Forks[Sequence]) -> None:
        """Put the answers to one prompt into the place of the sequence that computed it: they go on from its blocks.

        The first takes them over. The others share the full ones and get a copy of the one that all would write to; if
        there is no block for that, they wait and find the full ones in the prefix cache."""
        place = self.running.index(source)
        going = [fork for fork in forks[1:] if self.holdings.share(source, fork)]
        for fork in forks[1:]:
            if fork not in going:
                self._wait_first(fork)
        if forks:
            self.holdings.take_over(source, forks[0])
        else:
            self.holdings.free(source)
        self.running[place : place + 1] = [*forks[:1], *going]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks stay with the caller."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that the waiting sequences will need to start, cached ones included."""
        return sum(self.holdings.num_wanted(len(sequence.tokens)) for sequence in self.waiting)

    @property
    def decoding(self) -> list[Sequence]:
        """Those with one pending token."""
        return [sequence for sequence in self.running if sequence.is_decoding]

    @property
    def lacks_seats(self) -> bool:
        """Does somebody wait although there may be blocks for it?"""
        return bool(self.waiting) and len(self.running) >= self.limits.max_batch_seqs

    def find(self, key: Key) -> Sequence | None:
        return next((seq for seq in (*self.running, *self.waiting) if any(one.key == key for one in seq.answers)), None)

    def schedule(self) -> Batch | None:
        """The next step's work, with its blocks allocated; None if there is none."""
        self._max_tokens = max_tokens = self.limits.max_batch_tokens
        max_seqs = self.limits.max_batch_seqs
        picked: list[Scheduled] = []
        oldest_in_prompt = bool(self.running) and not self.running[0].is_decoding
        max_decodes = min(max_tokens, max_seqs) - oldest_in_prompt  # else these could shut it out for ever
        num_preemptions = self.num_preemptions
        for sequence in self.decoding:
            is_here = self.num_preemptions == num_preemptions or sequence in self.running
            if len(picked) < max_decodes and is_here and self._grow(sequence):
                picked.append(Scheduled(sequence, sequence.computed, 1, samples=True))
        prompts = [seq for seq in self.running if not seq.is_decoding]
        next_prompt = next(iter(prompts or self.waiting), None)
        self._max_tokens = len(picked) + self.slack.tokens_beside(self.decoding, next_prompt, max_tokens - len(picked))
        is_short = [index == 0 or seq.num_pending <= self.limits.prefill_chunk for index, seq in enumerate(prompts)]
        for sequence in compress(prompts, is_short):
            self._pick_chunk(sequence, picked)
        self._admit_waiting(picked, whole=True)
        for sequence in compress(prompts, map(not_, is_short)):
            self._pick_chunk(sequence, picked)
        self._admit_waiting(picked, whole=False)
        self._make_room_for_drafts(picked)
        return Batch(tuple(picked), tuple(self.holdings.copies)) if picked else None

    def advance(self, item: Scheduled, accepted: TokenIds[int]) -> None:
        """Record a computed item. With drafts a step may accept 0 to lookahead + 1 tokens; whatever was stored
        beyond the last accepted token is dropped by shrinking."""
        sequence = item.sequence
        sequence.tokens.extend(accepted)
        sequence.computed = len(sequence.tokens) - 1 if item.samples else item.start + item.num_new
        self.holdings.name_full(sequence)
        self.holdings.shrink(sequence)
        self.holdings.slide(sequence)

    def _room(self, picked: list[Scheduled]) -> int:
        """Tokens that the step can still take."""
        if len(picked) >= self.limits.max_batch_seqs:
            return 0
        return self._max_tokens - sum(item.num_new for item in picked)

    def _pick_chunk(self, sequence: Sequence, picked: list[Scheduled]) -> None:
        num_new = min(sequence.num_pending, self.limits.prefill_chunk, self._room(picked))
        if num_new > 0:
            picked.append(Scheduled(sequence, sequence.computed, num_new, samples=num_new == sequence.num_pending))

    def _admit_waiting(self, picked: list[Scheduled], whole: bool) -> None:
        """Take in whose turn it is, as long as there is room; with `whole` only those that the step can hold whole."""
        while self.waiting and self._room(picked) and len(self.running) < self.limits.max_batch_seqs:
            sequence = self._next_waiting(picked) if whole else self.waiting[0]
            if sequence is None or not self.holdings.admit(sequence):
                return
            self.waiting[0].num_overtaken += sequence is not self.waiting[0]
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._pick_chunk(sequence, picked)

    def _next_waiting(self, picked: list[Scheduled]) -> Sequence | None:
        """The first that the step can hold whole, if the first of all lets it pass."""
        room = min(self._room(picked), self.limits.prefill_chunk)
        patient = self.waiting[0].num_overtaken < self.limits.max_overtaken
        return next(
            (seq for seq in self.waiting if seq.num_pending <= room and (patient or seq is self.waiting[0])), None
        )

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for the pending token, preempting the youngest if need be; False if it was itself."""
        while not self.holdings.extend(sequence, sequence.computed + 1):
            victim = next((seq for seq in reversed(self.running) if not seq.handoff), sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _make_room_for_drafts(self, picked: list[Scheduled]) -> None:
        """With blocks that nobody needs for more; a hand-off leaves with its next token and needs none."""
        if self.limits.lookahead:
            for sequence in [item.sequence for item in picked if item.sequence.is_decoding]:
                if not sequence.handoff:
                    self.holdings.extend(sequence, sequence.computed + 1 + self.limits.lookahead)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.holdings.free(sequence)
        sequence.computed = 0
        sequence.prompt_logprobs.clear()
        self._wait_first(sequence)
        self.num_preemptions += 1

    def _wait_first(self, sequence: Sequence) -> None:
        """It has been computed here before: nobody goes ahead of it."""
        sequence.num_overtaken = self.limits.max_overtaken
        self.waiting.appendleft(sequence)
