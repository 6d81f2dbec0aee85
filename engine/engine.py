"""The engine: commands in, steps, outputs out. It has no phase, no clock, no threads and no tensors of its own.

One turn, as a step runner drives it:
1. `handle` each command that has come;
2. `begin`: the scheduler picks the next batch;
3. `take_outputs`: answers to reservations and news of first chunks go out before the step is computed;
4. the model computes the batch (a ModelRunner, or a modelled delay in the simulator);
5. `finish` records the sampled tokens; `take_outputs` again.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import Protocol

from engine.block_manager import BlockManager, Holder, HolderKind
from engine.scheduler import Batch, Scheduled, Scheduler, SchedulerLimits, holder_of
from engine.sequence import Sequence
from engine.types import (
    Abort,
    Add,
    Adopt,
    Command,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Key,
    Progress,
    Release,
    Request,
    Reserve,
    Reserved,
    StepOutputs,
    TokenOutput,
)

LEAK_CHECK_STEPS = 100  # the allocator is walked whenever the engine falls idle, and this often while it is busy


class ModelRunner(Protocol):
    """Computes a batch: for each scheduled item that samples, the tokens chosen after it; () for the others."""

    def execute(self, batch: Batch) -> list[tuple[int, ...]]: ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine must know of model and pool. Units: tokens, blocks."""

    limits: SchedulerLimits
    num_blocks: int
    max_context: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    hash_key: bytes


@dataclass(frozen=True, slots=True)
class Handoff:
    """Blocks of a prefilled request, held until Release."""

    block_ids: tuple[int, ...]


class Engine:
    """Drives one scheduler and one block manager by records. Not thread-safe: one runner owns it."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.blocks = BlockManager(spec.num_blocks)
        self.scheduler = Scheduler(spec.limits, self.blocks, spec.hash_key)
        self._held: dict[Holder, tuple[int, ...]] = {}  # hand-offs and reservations
        self._tokens: list[TokenOutput] = []
        self._progress: list[Progress] = []
        self._reserved: list[Reserved] = []
        self._num_steps = 0
        self._num_leaked = 0
        self._told_leaked = 0  # in the last outputs

    # --- one turn ------------------------------------------------------------------------------------------

    def handle(self, command: Command) -> None:
        match command:
            case Add():
                self._add(command)
            case Reserve():
                self._reserve(command)
            case Adopt():
                self._adopt(command)
            case Release(key):
                self._release(key)
            case Abort(key):
                self._abort(key)

    def begin(self) -> Batch | None:
        """The next batch, or None when there is nothing to compute."""
        batch = self.scheduler.schedule()
        if batch is None or self._num_steps % LEAK_CHECK_STEPS == 0:
            self._num_leaked = self.blocks.num_leaked(self._live_tables())
        for item in batch.scheduled if batch else ():
            if item.sequence.handoff and not item.sequence.announced:
                item.sequence.announced = True
                self._report_progress(item.sequence)
        return batch

    def finish(self, batch: Batch, sampled: TokenIds[tuple[int, ...]]) -> None:
        """Record what the model sampled for each scheduled item, in order."""
        self._num_steps += 1
        for item, token_ids in zip(batch.scheduled, sampled, strict=True):
            self._finish_item(item, token_ids)

    def take_outputs(self) -> StepOutputs:
        """What has happened since the last call."""
        outputs = StepOutputs(tuple(self._tokens), tuple(self._progress), tuple(self._reserved), self.stats())
        self._tokens, self._progress, self._reserved = [], [], []
        self._told_leaked = self._num_leaked
        return outputs

    @property
    def has_outputs(self) -> bool:
        return bool(self._tokens or self._progress or self._reserved) or self._num_leaked != self._told_leaked

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_held=len(self._held),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_available,
            num_cached_blocks=self.blocks.num_cached,
            num_held_blocks=sum(len(block_ids) for block_ids in self._held.values()),
            num_leaked_blocks=self._num_leaked,
            num_waiting_tokens=sum(
                seq.num_pending for seq in (*scheduler.waiting, *scheduler.running) if not seq.is_decoding
            ),
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )

    # --- commands ------------------------------------------------------------------------------------------

    def _add(self, command: Add) -> None:
        request = command.request
        problem = self._problem_with(request)
        if problem:
            self._fail(request.key, problem)
        elif self.scheduler.find(request.key) is None and Holder(HolderKind.HANDOFF, request.key) not in self._held:
            self.scheduler.add(Sequence.from_request(request, command.handoff))

    def _reserve(self, command: Reserve) -> None:
        holder = Holder(HolderKind.RESERVATION, command.key)
        needed = self._num_blocks_for(command.num_tokens + 1)
        growth = self._num_blocks_for(command.num_growth)
        free = self.blocks.num_available - self.scheduler.num_blocks_wanted
        if holder in self._held:
            block_ids: list[int] | None = list(self._held[holder])
        elif self.scheduler.lacks_seats or needed + growth > free:  # what waits here must not be overtaken for ever
            block_ids = None
        else:
            block_ids = self.blocks.allocate(holder, needed)
        if block_ids is None:
            blocks = f"{needed}+{growth} blocks wanted, {max(free, 0)} available"
            reason = "sequences wait for a seat" if self.scheduler.lacks_seats else blocks
            self._reserved.append(Reserved(command.key, None, reason))
            return
        self._held[holder] = tuple(block_ids)
        self._reserved.append(Reserved(command.key, tuple(block_ids)))

    def _adopt(self, command: Adopt) -> None:
        request = command.request
        holder = Holder(HolderKind.RESERVATION, request.key)
        block_ids = self._held.pop(holder, None)
        if self.scheduler.find(request.key) is not None:  # the command came twice
            self.blocks.free(holder, block_ids or ())
            return
        if block_ids is None:
            self._fail(request.key, ErrorInfo("transfer_failed", "no blocks are reserved for this request"))
            return
        problem = self._problem_with(request) or self._problem_with_blocks(command, block_ids)
        if problem:
            self.blocks.free(holder, block_ids)
            self._fail(request.key, problem)
            return
        sequence = Sequence.from_request(request)
        sequence.block_ids = list(block_ids)
        sequence.computed = command.computed
        sequence.cached_tokens = command.cached_tokens
        self.blocks.pass_on(holder, holder_of(sequence), block_ids)
        self.scheduler.adopt(sequence)

    def _release(self, key: Key) -> None:
        for kind in (HolderKind.HANDOFF, HolderKind.RESERVATION):
            holder = Holder(kind, key)
            self.blocks.free(holder, self._held.pop(holder, ()))

    def _abort(self, key: Key) -> None:
        sequence = self.scheduler.find(key)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self.scheduler.free(sequence)
            self._emit(sequence, (), FinishReason.ABORT)
        self._release(key)

    # --- results -------------------------------------------------------------------------------------------

    def _finish_item(self, item: Scheduled, token_ids: tuple[int, ...]) -> None:
        sequence = item.sequence
        accepted, finish = self._accept(sequence, token_ids)
        self.scheduler.advance(item, accepted)
        if sequence.handoff and not finish:
            self._report_progress(sequence, done=bool(accepted))
        if accepted:
            self._emit(sequence, accepted, finish)
        if finish:
            self.scheduler.remove(sequence)
            self.scheduler.free(sequence)
        elif accepted and sequence.handoff:
            self._hand_off(sequence)

    def _accept(self, sequence: Sequence, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], FinishReason | None]:
        """The sampled tokens up to the one that ends the sequence, and why it ends."""
        known = len(sequence.tokens)
        for count, token_id in enumerate(token_ids, start=1):
            sequence.tokens.append(token_id)
            finish = sequence.finish_reason(self.spec.eos_token_ids, self.spec.max_context)
            if finish:
                del sequence.tokens[known:]
                return token_ids[:count], finish
        del sequence.tokens[known:]
        return token_ids, None

    def _hand_off(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        holder = Holder(HolderKind.HANDOFF, sequence.key)
        self.blocks.pass_on(holder_of(sequence), holder, sequence.block_ids)
        self._held[holder] = tuple(sequence.block_ids)

    def _report_progress(self, sequence: Sequence, done: bool = False) -> None:
        self._progress.append(Progress(sequence.key, sequence.computed, tuple(sequence.block_ids), done))

    def _emit(self, sequence: Sequence, token_ids: tuple[int, ...], finish: FinishReason | None) -> None:
        first_index = sequence.num_generated - len(token_ids)
        self._tokens.append(
            TokenOutput(sequence.key, first_index, token_ids, finish, cached_tokens=sequence.cached_tokens)
        )

    def _fail(self, key: Key, error: ErrorInfo) -> None:
        self._tokens.append(TokenOutput(key, 0, (), FinishReason.ERROR, error))

    def _problem_with(self, request: Request) -> ErrorInfo | None:
        """Why this engine can never compute the request, or None."""
        longest = min(len(request.prompt_ids) + request.sampling.max_tokens, self.spec.max_context)
        capacity = self.spec.num_blocks * self.spec.limits.block_size
        if not request.prompt_ids:
            return ErrorInfo("invalid_request", "the prompt is empty")
        if request.num_tokens >= self.spec.max_context:
            return ErrorInfo(
                "invalid_request", f"{request.num_tokens} tokens do not fit the context of {self.spec.max_context}"
            )
        if longest > capacity:
            return ErrorInfo("invalid_request", f"{longest} tokens do not fit the KV pool of {capacity}")
        if not all(0 <= token_id < self.spec.vocab_size for token_id in (*request.prompt_ids, *request.generated_ids)):
            return ErrorInfo("invalid_request", f"a token id is outside the vocabulary of {self.spec.vocab_size}")
        return None

    def _problem_with_blocks(self, command: Adopt, block_ids: TokenIds[int]) -> ErrorInfo | None:
        """Why these reserved blocks cannot be what the command says, or None."""
        num_tokens = command.request.num_tokens
        if len(block_ids) < self._num_blocks_for(num_tokens):
            return ErrorInfo("transfer_failed", f"{len(block_ids)} blocks do not hold {num_tokens} tokens")
        if not 0 <= command.computed < num_tokens:
            return ErrorInfo("transfer_failed", f"{command.computed} of {num_tokens} tokens cannot be computed already")
        return None

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.spec.limits.block_size)

    def _live_tables(self) -> dict[Holder, TokenIds[int]]:
        """Whose blocks are whose, from the live sequences, hand-offs and reservations."""
        live: dict[Holder, TokenIds[int]] = dict(self._held)
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            live[holder_of(sequence)] = sequence.block_ids
        return live
