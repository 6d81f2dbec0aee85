"""Moves: what of an engine other workers may copy, and the sequences that stand still while they go elsewhere.

1. `lend` holds a known prefix under a key of its own until Release; `keep` makes a reservation that was written the
   prefix cache's;
2. `freeze` takes a sequence that decodes out of the scheduler: it keeps its blocks, and nobody computes it;
3. `resume` puts it back as if nothing had been, `thaw` lets go of it.
"""

from __future__ import annotations

from dataclasses import replace

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.block_table import transfer_entries
from engine.loans import keep, lend
from engine.reservation import Held, reserve_entries
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Sequence
from engine.types import Frozen, Keep, Key, Lend, Lent


class Moves:
    def __init__(
        self, limits: SchedulerLimits, blocks: BlockManager, scheduler: Scheduler, held: dict[Holder, Held]
    ) -> None:
        """`held`: the engine's table of what is held beside sequences."""
        self._limits = limits
        self._blocks = blocks
        self._scheduler = scheduler
        self._held = held
        self.frozen: dict[Key, Sequence] = {}
        self._lent: list[Lent] = []
        self._froze: list[Frozen] = []

    @property
    def has_news(self) -> bool:
        return bool(self._lent or self._froze)

    def take_news(self) -> tuple[tuple[Lent, ...], tuple[Frozen, ...]]:
        """Answers since the last call."""
        news = tuple(self._lent), tuple(self._froze)
        self._lent, self._froze = [], []
        return news

    def freeze(self, key: Key) -> None:
        self._froze.append(self._stand_still(key))

    def lend(self, command: Lend) -> None:
        holder, names = Holder(HolderKind.HANDOFF, command.key), command.names
        sequence = self._find(command.of) if command.of is not None else None
        if sequence is not None:
            self._scheduler.holdings.update_hashes(sequence)
            names = tuple(sequence.hashes[: sequence.computed // self._limits.block_size])
        limits = self._limits
        count, block_ids = 0, []
        if names and holder not in self._held:
            count, block_ids = lend(self._blocks, limits.groups, limits.block_size, holder, names)
        if count:
            self._held[holder] = Held(tuple(block_ids), count * limits.block_size)
        self._lent.append(Lent(command.key, names[:count], tuple(block_ids)))

    def keep(self, command: Keep) -> None:
        holder = Holder(HolderKind.RESERVATION, command.key)
        held = self._held.pop(holder, None)
        if held is not None:
            entries = reserve_entries(self._limits.groups, held.num_tokens, self._limits.block_size)
            keep(self._blocks, entries, held.block_ids, command.names)
            self._blocks.free(holder, held.block_ids)

    def _stand_still(self, key: Key) -> Frozen:
        sequence = self._scheduler.find(key)
        if sequence is None or sequence.is_joint or sequence.handoff or not sequence.is_decoding:
            return Frozen(key, None, "it does not decode here")
        if not sequence.tables or not self._scheduler.holdings.is_stored(sequence):
            return Frozen(key, None, "its blocks are not there at the moment")
        self._scheduler.remove(sequence)
        self.frozen[key] = sequence
        size = self._limits.block_size
        entries = transfer_entries(self._limits.groups, sequence.computed, size)
        block_ids = tuple(sequence.tables[group][index] for group, index in entries)
        request = replace(sequence.request, generated_ids=tuple(sequence.tokens[sequence.num_prompt :]))
        names = tuple(sequence.hashes[: sequence.computed // size])
        return Frozen(key, request, "", sequence.computed, sequence.cached_tokens, block_ids, names)

    def resume(self, key: Key) -> None:
        sequence = self.frozen.pop(key, None)
        if sequence is not None:
            self._scheduler.adopt(sequence)

    def thaw(self, key: Key) -> Sequence | None:
        """Let go of a frozen sequence: its full blocks stay cached."""
        sequence = self.frozen.pop(key, None)
        if sequence is not None:
            self._scheduler.holdings.free(sequence)
        return sequence

    def _find(self, key: Key) -> Sequence | None:
        return self.frozen.get(key) or self._scheduler.find(key)
