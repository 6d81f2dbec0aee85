"""SequenceBlocks: which blocks each sequence holds, in the block table of each group of layers.

Of one sequence:
1. `admit`       finds the longest cached prefix and allocates the rest for all known tokens, or takes nothing;
2. `extend`      adds blocks for more positions, all or none;
3. `share`, `take_over` give its blocks to the answers that go on from it; what they would all write to is copied;
4. `name_full`, `shrink`, `slide` follow a step: full blocks get their names, surplus ones and those that have left a
   window go back;
5. `free`        gives back all.
Copies are pairs of blocks that the next step makes before it writes; their sources have a holder until then. Bytes and
the order of sequences are others' business.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from contextlib import nullcontext

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.block_table import BlockTable, first_needed, num_blocks_for
from engine.cached_prefix import longest_prefix
from engine.planes import Group
from engine.prefix import extend_hashes, group_name, root_hash
from engine.sequence import Sequence
from engine.types import MEAN, Key

COPY = Holder(HolderKind.COPY, Key("", 0))


class SequenceBlocks:
    """The block tables of one engine's sequences, over its block manager."""

    def __init__(
        self, blocks: BlockManager, groups: tuple[Group, ...], block_size: int, prefix_cache: bool, hash_key: bytes
    ) -> None:
        self.copies: list[tuple[int, int]] = []  # (from, to), for the next step
        self.prefix_queries = 0  # prompt tokens looked up
        self.prefix_hits = 0
        self._blocks = blocks
        self._groups = groups
        self._block_size = block_size
        self._prefix_cache = prefix_cache
        self._hash_key = hash_key
        self._roots: dict[str, bytes] = {}

    def num_wanted(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens needs to start, cached ones included."""
        return len(self._groups) * self._num_blocks_for(num_tokens)

    def update_hashes(self, sequence: Sequence) -> None:
        """Name the full blocks of all its known tokens."""
        if self._prefix_cache:
            namespace = sequence.request.namespace
            root = self._roots.get(namespace) or self._roots.setdefault(namespace, root_hash(self._hash_key, namespace))
            extend_hashes(self._hash_key, sequence.hashes, root, sequence.tokens, self._block_size)

    def admit(self, sequence: Sequence) -> bool:
        """Find cached blocks and allocate the rest for all known tokens; False (nothing held) if they do not fit."""
        self.update_hashes(sequence)
        num_cached = self._num_cached(sequence)
        sequence.computed = min(num_cached * self._block_size, len(sequence.tokens) - 1)
        names = self._cached_names(sequence, num_cached)
        cold = [name for group in names for name in group if self._blocks.find(name) is None]
        with self._blocks.cold.pinned(cold) if self._blocks.cold and cold else nullcontext():
            if not self._take_blocks(sequence, names):
                sequence.computed = 0
                return False
        # A whole-prompt hit still computes its last token, into a private copy of the last block.
        sequence.num_named = num_cached - (num_cached * self._block_size == len(sequence.tokens))
        self._count_prefix(sequence)
        return True

    def share(self, source: Sequence, fork: Sequence) -> bool:
        """Give `fork` the blocks of `source` up to its computed position; False (nothing held) if one is lacking."""
        holder, num_full = holder_of(fork), source.computed // self._block_size
        shared = [table.ids[: max(0, num_full - table.first)] for table in source.tables]
        begun = [table[num_full] for table in source.tables] if source.computed % self._block_size else []
        fresh = self._blocks.allocate(holder, len(begun))
        if fresh is None:
            return False
        for block_ids in shared:
            self._blocks.share(holder, block_ids)
        self._blocks.share(COPY, begun)
        self.copies += zip(begun, fresh, strict=True)
        ends = [[block_id] for block_id in fresh] or [[] for _ in shared]
        fork.tables = [
            BlockTable(table.first, block_ids + end)
            for table, block_ids, end in zip(source.tables, shared, ends, strict=True)
        ]
        self._set_computed(source, fork)
        return True

    def take_over(self, source: Sequence, fork: Sequence) -> None:
        """Give `fork` all that `source` holds."""
        self._blocks.pass_on(holder_of(source), holder_of(fork), source.block_ids)
        fork.tables, source.tables = source.tables, []
        self._set_computed(source, fork)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for this many positions in all, or none if there are not enough."""
        stop = self._num_blocks_for(num_tokens)
        if all(table.stop >= stop for table in sequence.tables):  # nearly always
            return True
        missing = [max(stop - table.stop, 0) for table in sequence.tables]
        fresh = self._blocks.allocate(holder_of(sequence), sum(missing))
        for table, count in zip(sequence.tables, missing, strict=True):
            if fresh:
                table.ids += fresh[:count]
                del fresh[:count]
        return fresh is not None

    def name_full(self, sequence: Sequence) -> None:
        """So that the prefix cache finds the blocks that the step has filled."""
        num_full = sequence.computed // self._block_size
        if not self._prefix_cache or num_full <= sequence.num_named:
            return
        self.update_hashes(sequence)
        for group, table in enumerate(sequence.tables):
            for index in range(max(sequence.num_named, table.first), num_full):
                self._blocks.name(table[index], group_name(sequence.hashes[index], group))
        sequence.num_named = num_full

    def shrink(self, sequence: Sequence) -> None:
        """Give back the blocks past the last known token."""
        keep = self._num_blocks_for(len(sequence.tokens))
        for table in sequence.tables:
            surplus = table.ids[max(0, keep - table.first) :]
            if surplus:
                del table.ids[-len(surplus) :]
                self._blocks.free(holder_of(sequence), surplus)

    def slide(self, sequence: Sequence) -> None:
        """Give back the blocks that have left their group's window; full ones stay cached."""
        for table, group in zip(sequence.tables, self._groups, strict=True):
            first = min(first_needed(group, sequence.computed, self._block_size), table.stop)
            gone = table.ids[: first - table.first]
            if gone:
                del table.ids[: len(gone)]
                table.first = first
                self._blocks.free(holder_of(sequence), gone)

    def is_stored(self, sequence: Sequence) -> bool:
        """Are its computed positions in its blocks? Not while a copy to one of them is still to be made."""
        targets = [target for _, target in self.copies]
        return not any(block_id in targets for block_id in sequence.block_ids)

    def free(self, sequence: Sequence) -> None:
        """Give back all blocks of a sequence."""
        self._forget_copies(sequence.block_ids)
        self._blocks.free(holder_of(sequence), sequence.block_ids)
        sequence.tables.clear()
        sequence.num_named = 0

    def copied(self) -> None:
        """The step has made its copies: their sources may go."""
        self._blocks.free(COPY, self.copy_sources)
        self.copies.clear()

    @property
    def copy_sources(self) -> list[int]:
        return [source for source, _ in self.copies]

    # --- parts ---------------------------------------------------------------------------------------------

    def _cached_names(self, sequence: Sequence, num_cached: int) -> list[list[bytes]]:
        """Of each group: the names of the cached blocks from the first that the token at `computed` sees."""
        firsts = [first_needed(group, sequence.computed, self._block_size) for group in self._groups]
        return [
            [group_name(block_hash, group) for block_hash in sequence.hashes[first:num_cached]]
            for group, first in enumerate(firsts)
        ]

    def _take_blocks(self, sequence: Sequence, names: list[list[bytes]]) -> bool:
        """Share the named blocks that the pool has, and allocate the others; those in the host tier are loaded."""
        holder = holder_of(sequence)
        found = [[self._blocks.find(name) for name in group] for group in names]
        shared = [block_id for group in found for block_id in group if block_id is not None]
        self._blocks.share(holder, shared)
        firsts = [first_needed(group, sequence.computed, self._block_size) for group in self._groups]
        total = self._num_blocks_for(len(sequence.tokens))
        is_whole = (firsts[0] + len(names[0])) * self._block_size == len(sequence.tokens)
        num_copies = sum(group[-1] is not None for group in found) if is_whole else 0
        fresh = self._blocks.allocate(holder, sum(total - first for first in firsts) - len(shared) + num_copies)
        if fresh is None:
            self._blocks.free(holder, shared)
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
            assert self._blocks.cold is not None
            self._blocks.cold.load(name, taken)
            if not is_private:
                self._blocks.name(taken, name)
            return taken
        self.copies.append((block_id, taken))
        self._blocks.pass_on(holder, COPY, [block_id])  # its bytes must stay until the step has copied them
        return taken

    def _num_cached(self, sequence: Sequence) -> int:
        """The longest prefix, in blocks, after which all that the next token sees is cached in every group."""
        sampling = sequence.request.sampling
        wants_prompt = sampling.prompt_logprobs >= 0 and sequence.num_generated == 0
        wants_prompt = wants_prompt or sampling.embed == MEAN
        if not self._prefix_cache or wants_prompt:  # cached positions give neither logprobs nor states
            return 0
        known = self._blocks.is_known
        return longest_prefix(self._groups, self._block_size, sequence.hashes, len(sequence.tokens), known)

    def _count_prefix(self, sequence: Sequence) -> None:
        if sequence.num_generated == 0:
            sequence.cached_tokens = sequence.computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.computed

    def _set_computed(self, source: Sequence, fork: Sequence) -> None:
        """What is not computed yet may differ between the two, and with it the names."""
        fork.computed, fork.num_named = source.computed, source.num_named
        fork.hashes = source.hashes[: source.computed // self._block_size]

    def _forget_copies(self, targets: TokenIds[int]) -> None:
        """Those to these blocks shall not be made any more."""
        forgotten = [copy for copy in self.copies if copy[1] in targets]
        self.copies = [copy for copy in self.copies if copy not in forgotten]
        self._blocks.free(COPY, [source for source, _ in forgotten])

    def _num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self._block_size)


def holder_of(sequence: Sequence) -> Holder:
    return Holder(HolderKind.SEQUENCE, sequence.key)
