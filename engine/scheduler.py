"""The scheduler: which sequences compute how many tokens in the next step. Knows blocks by id, no tensors.

A step, under a token budget:
1. sequences that decode (one pending token each), oldest first; a sequence short of blocks preempts the youngest,
   which gives up its blocks and is computed again later; the oldest always goes on, also while it is in its prompt;
2. sequences in the middle of their prompt, a chunk each: the oldest, so that it always goes on, then those with no
   more than a chunk left;
3. waiting ones, when all blocks of their known tokens fit, so that a prefill never stalls half way. First come first
   served, but a prompt that the step cannot hold whole is overtaken by those behind it that it can: a few very long
   prompts do not hold up many short ones. Nobody is overtaken more than MAX_OVERTAKEN times;
4. what is left goes to the other long prompts under way.
Hand-offs are never preempted: a puller may be reading their blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Forks
from collections.abc import Sequence as TokenIds
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from operator import not_

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.block_table import BlockTable, first_needed, num_blocks_for
from engine.planes import Group
from engine.prefix import extend_hashes, group_name, root_hash
from engine.sequence import Sequence
from engine.types import Key

COPY = Holder(HolderKind.COPY, Key("", 0))
MAX_OVERTAKEN = 64


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
    groups: tuple[Group, ...] = (Group((0,)),)


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

    def fork(self, source: Sequence, forks: Forks[Sequence]) -> None:
        """Put the answers to one prompt into the place of the sequence that computed it: they go on from its blocks.

        The first takes them over. The others share the full ones and get a copy of the one that all would write to; if
        there is no block for that, they wait and find the full ones in the prefix cache."""
        place = self.running.index(source)
        going = [fork for fork in forks[1:] if self._share(source, fork)]
        self.waiting.extendleft(fork for fork in forks[1:] if fork not in going)
        if forks:
            self._take_over(source, forks[0])
        else:
            self.free(source)
        self.running[place : place + 1] = [*forks[:1], *going]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence; its blocks stay with the caller."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence."""
        self._forget_copies(sequence.block_ids)
        self.blocks.free(holder_of(sequence), sequence.block_ids)
        sequence.tables.clear()
        sequence.num_named = 0

    @property
    def num_blocks_wanted(self) -> int:
        """Blocks that the waiting sequences will need to start, cached ones included."""
        return sum(len(self.limits.groups) * self._num_blocks_for(len(sequence.tokens)) for sequence in self.waiting)

    @property
    def lacks_seats(self) -> bool:
        """Does somebody wait although there may be blocks for it?"""
        return bool(self.waiting) and len(self.running) >= self.limits.max_batch_seqs

    def find(self, key: Key) -> Sequence | None:
        return next((seq for seq in (*self.running, *self.waiting) if any(one.key == key for one in seq.answers)), None)

    def schedule(self) -> Batch | None:
        """The next step's work, with its blocks allocated; None if there is none."""
        max_tokens, max_seqs = self.limits.max_batch_tokens, self.limits.max_batch_seqs
        picked: list[Scheduled] = []
        oldest_in_prompt = bool(self.running) and not self.running[0].is_decoding
        max_decodes = min(max_tokens, max_seqs) - oldest_in_prompt  # else these could shut it out for ever
        for sequence in [seq for seq in self.running if seq.is_decoding]:
            if len(picked) < max_decodes and sequence in self.running and self._grow(sequence):
                picked.append(Scheduled(sequence, sequence.computed, 1, samples=True))
        prompts = [seq for seq in self.running if not seq.is_decoding]
        is_short = [index == 0 or seq.num_pending <= self.limits.prefill_chunk for index, seq in enumerate(prompts)]
        for sequence in compress(prompts, is_short):
            self._pick_chunk(sequence, picked)
        self._admit_waiting(picked, whole=True)
        for sequence in compress(prompts, map(not_, is_short)):
            self._pick_chunk(sequence, picked)
        self._admit_waiting(picked, whole=False)
        self._make_room_for_drafts(picked)
        return Batch(tuple(picked), tuple(self._copies)) if picked else None

    def copied(self) -> None:
        """The step has made its copies: their sources may go."""
        self.blocks.free(COPY, self.copy_sources)
        self._copies.clear()

    @property
    def copy_sources(self) -> list[int]:
        return [source for source, _ in self._copies]

    def _forget_copies(self, targets: TokenIds[int]) -> None:
        """Those to these blocks shall not be made any more."""
        forgotten = [copy for copy in self._copies if copy[1] in targets]
        self._copies = [copy for copy in self._copies if copy not in forgotten]
        self.blocks.free(COPY, [source for source, _ in forgotten])

    def advance(self, item: Scheduled, accepted: TokenIds[int]) -> None:
        """Record a computed item. With drafts a step may accept 0 to lookahead + 1 tokens; whatever was stored
        beyond the last accepted token is dropped by shrinking."""
        sequence = item.sequence
        sequence.tokens.extend(accepted)
        sequence.computed = len(sequence.tokens) - 1 if item.samples else item.start + item.num_new
        self._name_full_blocks(sequence)
        self._shrink(sequence)
        self._slide(sequence)

    def _room(self, picked: list[Scheduled]) -> int:
        """Tokens that the step can still take."""
        if len(picked) >= self.limits.max_batch_seqs:
            return 0
        return self.limits.max_batch_tokens - sum(item.num_new for item in picked)

    def _pick_chunk(self, sequence: Sequence, picked: list[Scheduled]) -> None:
        num_new = min(sequence.num_pending, self.limits.prefill_chunk, self._room(picked))
        if num_new > 0:
            picked.append(Scheduled(sequence, sequence.computed, num_new, samples=num_new == sequence.num_pending))

    def _admit_waiting(self, picked: list[Scheduled], whole: bool) -> None:
        """Take in whose turn it is, as long as there is room; with `whole` only those that the step can hold whole."""
        while self.waiting and self._room(picked) and len(self.running) < self.limits.max_batch_seqs:
            sequence = self._next_waiting(picked) if whole else self.waiting[0]
            if sequence is None or not self._admit(sequence):
                return
            self.waiting[0].num_overtaken += sequence is not self.waiting[0]
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._pick_chunk(sequence, picked)

    def _next_waiting(self, picked: list[Scheduled]) -> Sequence | None:
        """The first that the step can hold whole, if the first of all lets it pass."""
        room = min(self._room(picked), self.limits.prefill_chunk)
        patient = self.waiting[0].num_overtaken < MAX_OVERTAKEN
        return next(
            (seq for seq in self.waiting if seq.num_pending <= room and (patient or seq is self.waiting[0])), None
        )

    def _admit(self, sequence: Sequence) -> bool:
        """Find cached blocks and allocate the rest for all known tokens; False (nothing held) if they do not fit."""
        self._update_hashes(sequence)
        num_cached = self._num_cached(sequence)
        sequence.computed = min(num_cached * self.limits.block_size, len(sequence.tokens) - 1)
        names = self._cached_names(sequence, num_cached)
        cold = [name for group in names for name in group if self.blocks.find(name) is None]
        with self.blocks.cold.pinned(cold) if self.blocks.cold and cold else nullcontext():
            if not self._take_blocks(sequence, names):
                sequence.computed = 0
                return False
        # A whole-prompt hit still computes its last token, into a private copy of the last block.
        sequence.num_named = num_cached - (num_cached * self.limits.block_size == len(sequence.tokens))
        self._count_prefix(sequence)
        return True

    def _cached_names(self, sequence: Sequence, num_cached: int) -> list[list[bytes]]:
        """Of each group: the names of the cached blocks from the first that the token at `computed` sees."""
        firsts = [first_needed(group, sequence.computed, self.limits.block_size) for group in self.limits.groups]
        return [
            [group_name(block_hash, group) for block_hash in sequence.hashes[first:num_cached]]
            for group, first in enumerate(firsts)
        ]

    def _take_blocks(self, sequence: Sequence, names: list[list[bytes]]) -> bool:
        """Share the named blocks that the pool has, and allocate the others; those in the host tier are loaded."""
        holder = holder_of(sequence)
        found = [[self.blocks.find(name) for name in group] for group in names]
        shared = [block_id for group in found for block_id in group if block_id is not None]
        self.blocks.share(holder, shared)
        firsts = [first_needed(group, sequence.computed, self.limits.block_size) for group in self.limits.groups]
        total = self._num_blocks_for(len(sequence.tokens))
        is_whole = (firsts[0] + len(names[0])) * self.limits.block_size == len(sequence.tokens)
        num_copies = sum(group[-1] is not None for group in found) if is_whole else 0
        fresh = self.blocks.allocate(holder, sum(total - first for first in firsts) - len(shared) + num_copies)
        if fresh is None:
            self.blocks.free(holder, shared)
            return False
        for first, group_names, group_found in zip(firsts, names, found, strict=True):
            table = BlockTable(first)
            for index, (name, block_id) in enumerate(zip(group_names, group_found, strict=True), start=1):
                is_private = is_whole and index == len(group_names)
                table.ids.append(self._cached_block(holder, name, block_id, is_private, fresh))
            table.ids += [fresh.pop() for _ in range(total - table.stop)]
            sequence.tables.append(table)
        return True

    def _cached_block(
        self, holder: Holder, name: bytes, block_id: int | None, is_private: bool, fresh: list[int]
    ) -> int:
        """The block with the bytes of `name`: shared, loaded from the host tier, or (`is_private`) a copy."""
        if block_id is not None and not is_private:
            return block_id
        taken = fresh.pop()
        if block_id is None:
            assert self.blocks.cold is not None
            self.blocks.cold.load(name, taken)
            if not is_private:
                self.blocks.name(taken, name)
            return taken
        self._copies.append((block_id, taken))
        self.blocks.pass_on(holder, COPY, [block_id])  # its bytes must stay until the step has copied them
        return taken

    def _num_cached(self, sequence: Sequence) -> int:
        """The longest prefix, in blocks, after which all that the next token sees is cached in every group."""
        wants_prompt = sequence.request.sampling.prompt_logprobs >= 0 and sequence.num_generated == 0
        if not self.limits.prefix_cache or wants_prompt:  # cached positions give no logprobs
            return 0
        longest = len(sequence.hashes)
        runs: list[list[int]] = []  # of each windowed group: how many blocks up to each are cached without a gap
        for index, group in enumerate(self.limits.groups):
            names = [group_name(block_hash, index) for block_hash in sequence.hashes]
            if group.window is None:
                known = (index for index, name in enumerate(names[:longest]) if not self.blocks.is_known(name))
                longest = next(known, longest)
            else:
                runs.append(self._runs(names))
        windowed = [group for group in self.limits.groups if group.window is not None]
        for count in range(longest, 0, -1):
            computed = min(count * self.limits.block_size, len(sequence.tokens) - 1)
            needed = [count - first_needed(group, computed, self.limits.block_size) for group in windowed]
            if all(run[count - 1] >= num for run, num in zip(runs, needed, strict=True)):
                return count
        return 0

    def _runs(self, names: TokenIds[bytes]) -> list[int]:
        runs, run = [], 0
        for name in names:
            run = run + 1 if self.blocks.is_known(name) else 0
            runs.append(run)
        return runs

    def _share(self, source: Sequence, fork: Sequence) -> bool:
        """Give `fork` the blocks of `source` up to its computed position; False (nothing held) if one is lacking."""
        holder, num_full = holder_of(fork), source.computed // self.limits.block_size
        shared = [table.ids[: max(0, num_full - table.first)] for table in source.tables]
        begun = [table[num_full] for table in source.tables] if source.computed % self.limits.block_size else []
        fresh = self.blocks.allocate(holder, len(begun))
        if fresh is None:
            return False
        for block_ids in shared:
            self.blocks.share(holder, block_ids)
        self.blocks.share(COPY, begun)
        self._copies += zip(begun, fresh, strict=True)
        ends = [[block_id] for block_id in fresh] or [[] for _ in shared]
        fork.tables = [
            BlockTable(table.first, block_ids + end)
            for table, block_ids, end in zip(source.tables, shared, ends, strict=True)
        ]
        self._set_computed(source, fork)
        return True

    def _take_over(self, source: Sequence, fork: Sequence) -> None:
        self.blocks.pass_on(holder_of(source), holder_of(fork), source.block_ids)
        fork.tables, source.tables = source.tables, []
        self._set_computed(source, fork)

    def _set_computed(self, source: Sequence, fork: Sequence) -> None:
        fork.computed, fork.num_named, fork.hashes = source.computed, source.num_named, [*source.hashes]

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
        stop = self._num_blocks_for(num_tokens)
        missing = [max(stop - table.stop, 0) for table in sequence.tables]
        fresh = self.blocks.allocate(holder_of(sequence), sum(missing))
        for table, count in zip(sequence.tables, missing, strict=True):
            if fresh:
                table.ids += fresh[:count]
                del fresh[:count]
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
        sequence.prompt_logprobs.clear()
        sequence.num_overtaken = MAX_OVERTAKEN  # it has been here before: nobody goes ahead of it
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _shrink(self, sequence: Sequence) -> None:
        """Give back the blocks past the last known token."""
        keep = self._num_blocks_for(len(sequence.tokens))
        for table in sequence.tables:
            surplus = table.ids[max(0, keep - table.first) :]
            if surplus:
                del table.ids[-len(surplus) :]
                self.blocks.free(holder_of(sequence), surplus)

    def _slide(self, sequence: Sequence) -> None:
        """Give back the blocks that have left their group's window; full ones stay cached."""
        for table, group in zip(sequence.tables, self.limits.groups, strict=True):
            first = min(first_needed(group, sequence.computed, self.limits.block_size), table.stop)
            gone = table.ids[: first - table.first]
            if gone:
                del table.ids[: len(gone)]
                table.first = first
                self.blocks.free(holder_of(sequence), gone)

    def _name_full_blocks(self, sequence: Sequence) -> None:
        if not self.limits.prefix_cache:
            return
        self._update_hashes(sequence)
        num_full = sequence.computed // self.limits.block_size
        for group, table in enumerate(sequence.tables):
            for index in range(max(sequence.num_named, table.first), num_full):
                self.blocks.name(table[index], group_name(sequence.hashes[index], group))
        sequence.num_named = max(sequence.num_named, num_full)

    def _update_hashes(self, sequence: Sequence) -> None:
        if self.limits.prefix_cache:
            namespace = sequence.request.namespace
            root = self._roots.get(namespace) or self._roots.setdefault(namespace, root_hash(self._hash_key, namespace))
            extend_hashes(self._hash_key, sequence.hashes, root, sequence.tokens, self.limits.block_size)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self.limits.block_size)


def holder_of(sequence: Sequence) -> Holder:
    return Holder(HolderKind.SEQUENCE, sequence.key)
