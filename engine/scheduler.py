"""The scheduler: which sequences compute how many tokens in the next step. Knows blocks by id, no tensors.

A step, under a token budget:
1. sequences that decode (one pending token each), oldest first; a sequence short of blocks preempts the youngest,
   which gives up its blocks and is computed again later; the oldest always goes on, also while it is in its prompt;
2. sequences in the middle of their prompt, oldest first, a chunk each;
3. waiting ones, first come first served, when all blocks of their known tokens fit. So a prefill never stalls
   half way, and nobody overtakes for ever.
Hand-offs are never preempted: a puller may be reading their blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as TokenIds
from dataclasses import dataclass

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.prefix import extend_hashes, root_hash
from engine.sequence import Sequence
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


class Scheduler:
    """Owns the waiting and running sequences and their blocks. One that waits holds no blocks."""

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, hash_key: bytes) -> None:
        self.limits = limits
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._hash_key = hash_key
        self._roots: dict[str, bytes] = {}
        self._copies: list[tuple[int, int]] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Take in a sequence that holds computed blocks. It is the youngest: without a seat in the batch it waits
        for one in `running`, where others can preempt it."""
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks stay with the caller."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence."""
        self.blocks.free(holder_of(sequence), sequence.block_ids)
        sequence.block_ids.clear()
        sequence.num_named = 0

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that the waiting sequences will need to start, cached ones included."""
        return sum(self._num_blocks_for(len(sequence.tokens)) for sequence in self.waiting)

    @property
    def lacks_seats(self) -> bool:
        """Does somebody wait although there may be blocks for it?"""
        return bool(self.waiting) and len(self.running) >= self.limits.max_batch_seqs

    def find(self, key: Key) -> Sequence | None:
        return next((seq for seq in (*self.running, *self.waiting) if seq.key == key), None)

    def schedule(self) -> Batch | None:
        """The next step's work, with its blocks allocated; None if there is none."""
        max_tokens, max_seqs = self.limits.max_batch_tokens, self.limits.max_batch_seqs
        picked: list[Scheduled] = []
        oldest_in_prompt = bool(self.running) and not self.running[0].is_decoding
        max_decodes = min(max_tokens, max_seqs) - oldest_in_prompt  # else these could shut it out for ever
        for sequence in [seq for seq in self.running if seq.is_decoding]:
            if len(picked) < max_decodes and sequence in self.running and self._grow(sequence):
                picked.append(Scheduled(sequence, sequence.computed, 1, samples=True))
        budget = max_tokens - len(picked)
        for sequence in [seq for seq in self.running if not seq.is_decoding]:
            if len(picked) < max_seqs:
                budget -= self._pick_chunk(sequence, budget, picked)
        while budget and self.waiting and len(self.running) < max_seqs and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            budget -= self._pick_chunk(sequence, budget, picked)
        self._make_room_for_drafts(picked)
        copies, self._copies = tuple(self._copies), []
        return Batch(tuple(picked), copies) if picked else None

    def advance(self, item: Scheduled, accepted: TokenIds[int]) -> None:
        """Record a computed item. With drafts a step may accept 0 to lookahead + 1 tokens; whatever was stored
        beyond the last accepted token is dropped by shrinking."""
        sequence = item.sequence
        sequence.tokens.extend(accepted)
        sequence.computed = len(sequence.tokens) - 1 if item.samples else item.start + item.num_new
        self._name_full_blocks(sequence)
        self._shrink(sequence)

    def _pick_chunk(self, sequence: Sequence, budget: int, picked: list[Scheduled]) -> int:
        num_new = min(sequence.num_pending, self.limits.prefill_chunk, budget)
        if num_new > 0:
            picked.append(Scheduled(sequence, sequence.computed, num_new, samples=num_new == sequence.num_pending))
        return num_new

    def _admit(self, sequence: Sequence) -> bool:
        """Find cached blocks and allocate the rest for all known tokens; False (nothing held) if they do not fit."""
        self._update_hashes(sequence)
        cached = self.blocks.match(sequence.hashes) if self.limits.prefix_cache else []
        fresh_needed = self._num_blocks_for(len(sequence.tokens)) - len(cached)
        # A whole-prompt hit still computes its last token, into a private copy of the last block.
        fully_cached = bool(cached) and len(cached) * self.limits.block_size == len(sequence.tokens)
        holder = holder_of(sequence)
        self.blocks.share(holder, cached)
        fresh = self.blocks.allocate(holder, fresh_needed + fully_cached)
        if fresh is None:
            self.blocks.free(holder, cached)
            return False
        if fully_cached:
            self._copies.append((cached[-1], fresh[-1]))
            self.blocks.free(holder, [cached.pop()])
        sequence.block_ids = [*cached, *fresh]
        sequence.num_named = len(cached)
        sequence.computed = min((len(cached) + fully_cached) * self.limits.block_size, len(sequence.tokens) - 1)
        self._count_prefix(sequence)
        return True

    def _count_prefix(self, sequence: Sequence) -> None:
        if sequence.num_generated == 0:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.computed

    def _grow(self, sequence: Sequence) -> bool:
        """Blocks for the pending token, preempting the youngest if need be; False if it was itself."""
        while not self._extend(sequence, sequence.computed + 1):
            victim = next((seq for seq in reversed(self.running) if not seq.handoff), sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for this many positions in all, or none if there are not enough."""
        missing = self._num_blocks_for(num_tokens) - len(sequence.block_ids)
        fresh = self.blocks.allocate(holder_of(sequence), max(missing, 0))
        sequence.block_ids.extend(fresh or ())
        return fresh is not None

    def _make_room_for_drafts(self, picked: list[Scheduled]) -> None:
        """With blocks that nobody needs for more; a hand-off leaves with its next token and needs none."""
        if self.limits.lookahead:
            for sequence in [item.sequence for item in picked if item.sequence.is_decoding]:
                if not sequence.handoff:
                    self._extend(sequence, sequence.computed + 1 + self.limits.lookahead)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.free(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _shrink(self, sequence: Sequence) -> None:
        keep = self._num_blocks_for(len(sequence.tokens))
        surplus = sequence.block_ids[keep:]
        if surplus:
            del sequence.block_ids[keep:]
            self.blocks.free(holder_of(sequence), surplus)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        if not self.limits.prefix_cache:
            return
        self._update_hashes(sequence)
        num_full = sequence.computed // self.limits.block_size
        for index in range(sequence.num_named, num_full):
            self.blocks.name(sequence.block_ids[index], sequence.hashes[index])
        sequence.num_named = max(sequence.num_named, num_full)

    def _update_hashes(self, sequence: Sequence) -> None:
        if self.limits.prefix_cache:
            namespace = sequence.request.namespace
            root = self._roots.get(namespace) or self._roots.setdefault(namespace, root_hash(self._hash_key, namespace))
            extend_hashes(self._hash_key, sequence.hashes, root, sequence.tokens, self.limits.block_size)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.block_size)


def holder_of(sequence: Sequence) -> Holder:
    return Holder(HolderKind.SEQUENCE, sequence.key)
