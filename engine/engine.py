"""The engine: commands in, steps, outputs out. It has no phase, no clock, no threads and no tensors of its own.

One turn, as a step runner drives it:
1. `handle` each command that has come;
2. `begin`: the scheduler picks the next batch;
3. `take_outputs`: answers to reservations and news of first chunks go out before the step is computed;
4. the model computes the batch (a ModelRunner, or a modelled delay in the simulator), and meanwhile its `layer_news`
   goes out;
5. `finish` records the sampled tokens, and `learn` how long the step took; `take_outputs` again.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol

from engine.ahead import follow
from engine.block_manager import BlockManager, Holder, HolderKind
from engine.block_table import BlockTable, first_needed, num_blocks_for, transfer_entries
from engine.host_tier import HostTier, TierStats
from engine.layer_groups import WHOLE_STEPS, LayerGroups, LayerNews, LayersStored
from engine.moves import Moves
from engine.planes import Group
from engine.prefix import group_name, short_names
from engine.reservation import Held, names_here, num_taken, reserve_entries, take
from engine.runs import runs_of
from engine.scheduler import Batch, Scheduled, Scheduler, SchedulerLimits
from engine.sequence import Sequence
from engine.sequence_blocks import COPY, holder_of
from engine.slack import Paced, broken_promise
from engine.step_shape import StepRecord
from engine.types import (
    NO_NEWS,
    POOLINGS,
    UNBOUNDED,
    Abort,
    Add,
    Adopt,
    CacheNews,
    Command,
    EngineStats,
    ErrorInfo,
    FinishReason,
    Freeze,
    Keep,
    Key,
    Lend,
    Progress,
    Release,
    Request,
    Reserve,
    Reserved,
    Resume,
    Sampled,
    StepOutputs,
    TokenLogprob,
    TokenOutput,
)

SAMPLED_STEPS = 16  # one in so many steps that only decode is learnt from
LEAK_CHECK_STEPS = 100  # the allocator is walked whenever the engine falls idle, and this often while it is busy


class ModelRunner(Protocol):
    """Computes a batch: what was chosen after each scheduled item, in order. Tells `stored` of each layer."""

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]: ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine must know of model and pool. Units: tokens, blocks."""

    limits: SchedulerLimits
    num_blocks: int
    max_context: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    hash_key: bytes
    layer_groups: LayerGroups = WHOLE_STEPS


class Engine:
    """Drives one scheduler and one block manager by records. Not thread-safe: one runner owns it."""

    def __init__(self, spec: EngineSpec, tier: HostTier | None = None) -> None:
        self.spec = spec
        self.blocks = BlockManager(spec.num_blocks, tier)
        self._tier = tier
        self.scheduler = Scheduler(spec.limits, self.blocks, spec.hash_key)
        self._held: dict[Holder, Held] = {}  # hand-offs, loans and reservations
        self._tokens: list[TokenOutput] = []
        self._progress: list[Progress] = []
        self._reserved: list[Reserved] = []
        self.num_steps = 0
        self._num_leaked = 0
        self._next_check = 0  # by the number of steps
        self._told_leaked = 0  # in the last outputs
        self._is_new = False  # has somebody come whose first step is still to be computed?
        self._tells_cache = False
        self._slack_tokens = UNBOUNDED
        self._slack_of: list[Sequence] = []  # who ran when that was found
        self.moves = Moves(spec.limits, self.blocks, self.scheduler, self._held)

    # --- one turn ------------------------------------------------------------------------------------------

    def handle(self, command: Command) -> None:
        self._tells_cache = True
        self._is_new = self._is_new or isinstance(command, Add | Adopt)
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
            case Lend():
                self.moves.lend(command)
            case Keep():
                self.moves.keep(command)
            case Freeze(key):
                self.moves.freeze(key)
            case Resume(key):
                self.moves.resume(key)

    def begin(self) -> Batch | None:
        """The next batch, or None when there is nothing to compute."""
        batch = self.scheduler.schedule()
        if batch is None or self.num_steps >= self._next_check:
            self._next_check = self.num_steps + LEAK_CHECK_STEPS
            self._num_leaked = self.blocks.num_leaked(self._live_tables())
        self._renew_slack(batch)
        for item in batch.scheduled if batch else ():
            if item.sequence.handoff and not item.sequence.announced:
                item.sequence.announced = True
                self._report_progress(item.sequence, names=tuple(item.sequence.hashes))
        return batch

    def layer_news(self, batch: Batch) -> LayerNews | None:
        """What to tell while this batch is computed, if it fills blocks of hand-offs."""
        size, told = self.spec.limits.block_size, list[Progress]()
        num_filled = 0
        for item in batch.scheduled if self.spec.layer_groups.group_bytes else ():
            if item.sequence.handoff:
                stop = item.start + item.num_new
                num_ready = self._num_blocks_for(stop) if item.samples else stop // size
                num_filled += num_ready - item.start // size
                ready = self._ready(item.sequence, num_ready)
                told.append(Progress(item.sequence.key, item.sequence.computed, ready, num_layers=0))
        marks = self.spec.layer_groups.marks(num_filled)
        return LayerNews(tuple(told), self.stats(), marks) if marks else None

    def finish(self, batch: Batch, sampled: TokenIds[Sampled]) -> None:
        """Record what the model sampled for each scheduled item, in order."""
        self.num_steps += 1
        self.scheduler.holdings.copied()
        only_decodes = all(item.sequence.is_decoding and not item.sequence.handoff for item in batch.scheduled)
        self._tells_cache = self._tells_cache or self._is_new or not only_decodes
        self._is_new = False
        for item, chosen in zip(batch.scheduled, sampled, strict=True):
            if item.sequence.tables:  # else it ended in the step before, after this one was launched
                self._finish_item(item, chosen)

    def ahead(self, batch: Batch) -> Batch | None:
        """What follows this batch, which is being computed, if that is known already (engine/ahead.py)."""
        return follow(self.scheduler, batch, self.spec.max_context)

    def learn(self, record: StepRecord) -> None:
        """How long the step took that was finished last."""
        self.scheduler.slack.pass_time(record.step_s)
        if record.shape.chunks or self.is_sample:
            self.scheduler.slack.pace.learn(record)

    @property
    def is_sample(self) -> bool:
        """Is the last step, if it only decoded, one to learn from? So many more tell nothing new."""
        return self.num_steps % SAMPLED_STEPS == 0 or self.num_steps < SAMPLED_STEPS

    def _renew_slack(self, batch: Batch | None) -> None:
        """Where somebody has come, gone, or got on with a prompt."""
        scheduler = self.scheduler
        in_prompt = any(not item.sequence.is_decoding for item in batch.scheduled) if batch else False
        if in_prompt or scheduler.running != self._slack_of:
            self._slack_of = [*scheduler.running]
            self._slack_tokens = scheduler.slack.report(scheduler.decoding, self.spec.limits.prefill_chunk)

    def take_outputs(self) -> StepOutputs:
        """What has happened since the last call."""
        outputs = StepOutputs(
            tuple(self._tokens), tuple(self._progress), tuple(self._reserved), *self.moves.take_news(), self.stats(),
            cache=self._cache_news(),
        )  # fmt: skip
        self._tokens, self._progress, self._reserved = [], [], []
        self._told_leaked = self._num_leaked
        return outputs

    def _cache_news(self) -> CacheNews:
        """What decoding alone names and evicts waits until somebody comes, ends or computes a prompt. So a stream of
        decode steps says nothing of it, and steps that a simulation advances together say what single ones would."""
        if not self._tells_cache:
            return NO_NEWS
        self._tells_cache = False
        kept, lost = self.blocks.take_changes()
        return CacheNews(short_names(kept), short_names(lost)) if kept or lost else NO_NEWS

    @property
    def has_outputs(self) -> bool:
        news = self._tokens or self._progress or self._reserved or self.moves.has_news
        return bool(news) or self._num_leaked != self._told_leaked

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        tier = self._tier.stats() if self._tier else TierStats()
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_held=len(self._held) + len(self.moves.frozen),
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_available,
            num_cached_blocks=self.blocks.num_cached,
            num_held_blocks=sum(len(one.block_ids) for one in (*self._held.values(), *self.moves.frozen.values())),
            num_leaked_blocks=self._num_leaked,
            num_waiting_tokens=sum(
                seq.num_pending for seq in (*scheduler.waiting, *scheduler.running) if not seq.is_decoding
            ),
            num_steps=self.num_steps,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.holdings.prefix_queries,
            prefix_hits=scheduler.holdings.prefix_hits,
            host_blocks=tier.num_blocks,
            host_queries=tier.num_queries,
            host_hits=tier.num_hits,
            host_saves=tier.num_saves,
            slack_tokens=self._slack_tokens,
        )

    # --- commands ------------------------------------------------------------------------------------------

    def _add(self, command: Add) -> None:
        request = command.request
        problem = self._problem_with(request) or _problem_with_embedding(command)
        if problem:
            self._fail((request, *command.siblings), problem)
        elif self.scheduler.find(request.key) is None and Holder(HolderKind.HANDOFF, request.key) not in self._held:
            self.scheduler.add(Sequence.from_request(request, command.handoff, command.siblings))

    def _reserve(self, command: Reserve) -> None:
        holder = Holder(HolderKind.RESERVATION, command.key)
        refusal = None if holder in self._held else self._take_reserved(holder, command)
        if refusal:
            self._reserved.append(Reserved(command.key, None, refusal))
            return
        held = self._held[holder]
        self._reserved.append(Reserved(command.key, held.block_ids, present=held.present))

    def _take_reserved(self, holder: Holder, command: Reserve) -> str | None:
        """Hold these blocks; or why not. What waits here must not be overtaken for ever."""
        entries = self._reserve_entries(command.num_tokens)
        hashes = command.names[: command.num_tokens // self.spec.limits.block_size]
        names = names_here(self.blocks, entries, hashes)
        needed = num_taken(self.blocks, len(entries), names)
        growth = self._num_growth_blocks(command.num_growth)
        if command.num_answers > 1:  # many answers may take turns: half of the pool is enough to begin with
            growth = max(growth, min(growth * command.num_answers, self.blocks.num_blocks // 2))
        growth = min(growth, self.blocks.num_blocks - len(entries))  # an empty pool has room for whatever may come here
        free = self.blocks.num_available - self.scheduler.num_blocks_wanted
        if self.scheduler.lacks_seats:
            return "sequences wait for a seat"
        late = self._would_be_late(command)
        if late:
            return late
        block_ids = take(self.blocks, holder, len(entries), names) if needed + growth <= free else None
        if block_ids is None:
            return f"{needed}+{growth} blocks wanted, {max(free, 0)} available"
        num_answers = command.num_answers if command.num_growth else 0
        self._held[holder] = Held(tuple(block_ids), command.num_tokens, runs_of(names), num_answers, command.tpot_s)
        return None

    def _would_be_late(self, command: Reserve) -> str | None:
        """Why somebody's promise would not be kept if these answers joined the step, or None."""
        running = [Paced.of(sequence) for sequence in self.scheduler.decoding]
        coming = [
            Paced(one.num_answers, one.num_answers * one.num_tokens, one.tpot_s)
            for one in self._held.values()
            if one.num_answers
        ]
        new = Paced(command.num_answers, command.num_answers * command.num_tokens, command.tpot_s)
        return broken_promise(self.scheduler.slack.pace, (*running, *coming), new)

    def _reserve_entries(self, num_tokens: int) -> list[tuple[int, int]]:
        """(group, index) of what is transferred of these positions, then of what the next token needs beside it."""
        return reserve_entries(self._groups, num_tokens, self.spec.limits.block_size)

    def _num_growth_blocks(self, num_tokens: int) -> int:
        """Blocks that as many more tokens are likely to need: a window grows no wider than it is."""
        bounds = [num_tokens if group.window is None else min(num_tokens, group.window) for group in self._groups]
        return sum(map(self._num_blocks_for, bounds))

    def _adopt(self, command: Adopt) -> None:
        request, requests = command.request, (command.request, *command.siblings)
        holder = Holder(HolderKind.RESERVATION, command.reserved or request.key)
        held = self._held.pop(holder, None)
        ended = [one for one in requests if self.scheduler.find(one.key) is None]
        if len(ended) < len(requests):  # the command came twice; those that are not here any more have been answered
            self.blocks.free(holder, held.block_ids if held else ())
            self._fail(ended, ErrorInfo("transfer_failed", "it was adopted before, and has ended"))
            return
        if held is None:
            self._fail(requests, ErrorInfo("transfer_failed", "no blocks are reserved for this request"))
            return
        sequence = Sequence.from_request(request)
        problem = next(filter(None, map(self._problem_with, requests)), None)
        problem = problem or self._problem_with_blocks(command, held)
        problem = problem or self._problem_with_present(sequence, command.computed, held)
        if problem:
            self.blocks.free(holder, held.block_ids)
            self._fail(requests, problem)
            return
        sequence.tables = self._tables_of(held)
        sequence.computed = command.computed
        self.blocks.pass_on(holder, holder_of(sequence), held.block_ids)
        self.scheduler.adopt(sequence)
        forks = [Sequence.from_request(one) for one in requests]
        for fork in forks:
            fork.cached_tokens = command.cached_tokens
            fork.waited_s = command.waited_s
        self.scheduler.fork(sequence, forks)

    def _tables_of(self, held: Held) -> list[BlockTable]:
        """Block tables over reserved blocks."""
        firsts = [first_needed(group, held.num_tokens, self.spec.limits.block_size) for group in self._groups]
        tables = [BlockTable(first) for first in firsts]
        for (group, _), block_id in zip(self._reserve_entries(held.num_tokens), held.block_ids, strict=True):
            tables[group].ids.append(block_id)
        return tables

    def _release(self, key: Key) -> None:
        self.moves.thaw(key)
        for kind in (HolderKind.HANDOFF, HolderKind.RESERVATION):
            holder = Holder(kind, key)
            held = self._held.pop(holder, None)
            self.blocks.free(holder, held.block_ids if held else ())

    def _abort(self, key: Key) -> None:
        frozen = self.moves.thaw(key)
        if frozen is not None:
            self._tokens.append(TokenOutput(key, frozen.num_generated, (), FinishReason.ABORT))
        sequence = self.scheduler.find(key)
        if sequence is not None:
            sequence.answers = [answer for answer in sequence.answers if answer.key != key]
            self._tokens.append(TokenOutput(key, sequence.num_generated, (), FinishReason.ABORT))
            if not sequence.answers:
                self.scheduler.remove(sequence)
                self.scheduler.holdings.free(sequence)
        self._release(key)

    # --- results -------------------------------------------------------------------------------------------

    def _finish_item(self, item: Scheduled, chosen: Sampled) -> None:
        sequence = item.sequence
        if chosen.error is not None:
            self._fail(sequence.answers, chosen.error)
            self._leave(sequence)
            return
        if chosen.embedding:
            self._finish_embedding(item, chosen.embedding)
            return
        sequence.prompt_logprobs += chosen.prompt_logprobs
        if item.samples and sequence.is_joint:
            self._finish_joint(item, chosen)
            return
        accepted, finish = self._accept(sequence, chosen.token_ids)
        self.scheduler.advance(item, accepted)
        if sequence.handoff and not finish:
            self._report_progress(sequence, done=bool(accepted))
        if accepted:
            self._emit(sequence, accepted, finish, chosen.logprobs[: len(accepted)])
        if finish:
            self._tells_cache = True
            self._leave(sequence)
        elif accepted and sequence.handoff:
            self._hand_off(sequence)

    def _finish_embedding(self, item: Scheduled, embedding: bytes) -> None:
        """All of the prompt is computed, and nothing follows it."""
        self.scheduler.advance(replace(item, samples=False), ())
        self._emit(item.sequence, (), FinishReason.STOP, embedding=embedding)
        self._leave(item.sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.scheduler.holdings.free(sequence)

    def _finish_joint(self, item: Scheduled, chosen: Sampled) -> None:
        """The prompt of several answers is computed: each goes on from here with a first token of its own."""
        sequence, going = item.sequence, []
        self.scheduler.advance(replace(item, samples=False), ())
        for request, one in zip(sequence.answers, (chosen, *chosen.siblings), strict=True):
            fork = Sequence.from_request(request)
            fork.cached_tokens = sequence.cached_tokens
            fork.tokens += one.token_ids
            finish = fork.finish_reason(self.spec.eos_token_ids, self.spec.max_context)
            fork.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
            self._emit(fork, one.token_ids, finish, one.logprobs)
            going += [] if finish else [fork]
        if sequence.handoff and going:
            self._report_progress(sequence, done=True)
            self._hand_off(sequence)
        else:
            self.scheduler.fork(sequence, going)

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
        self._held[holder] = Held(tuple(sequence.block_ids), sequence.computed)

    def _report_progress(self, sequence: Sequence, done: bool = False, names: tuple[bytes, ...] = ()) -> None:
        """Tell which of the blocks to be transferred are complete: all with the first token, the full ones before."""
        size, num_tokens = self.spec.limits.block_size, sequence.request.num_tokens
        num_ready = self._num_blocks_for(num_tokens) if done else sequence.computed // size
        ready = self._ready(sequence, num_ready)
        self._progress.append(Progress(sequence.key, sequence.computed, ready, done, names))

    def _ready(self, sequence: Sequence, num_ready: int) -> tuple[int, ...]:
        """Of the blocks to be transferred those with an index below `num_ready`."""
        entries = transfer_entries(self._groups, sequence.request.num_tokens, self.spec.limits.block_size)
        return tuple(sequence.tables[group][index] for group, index in entries if index < num_ready)

    def _emit(
        self, sequence: Sequence, token_ids: tuple[int, ...], finish: FinishReason | None,
        logprobs: tuple[TokenLogprob, ...] = (), embedding: bytes = b"",
    ) -> None:  # fmt: skip
        first_index = sequence.num_generated - len(token_ids)
        output = TokenOutput(
            sequence.key, first_index, token_ids, finish, cached_tokens=sequence.cached_tokens, logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs), embedding=embedding,
        )  # fmt: skip
        sequence.prompt_logprobs.clear()
        self._tokens.append(output)

    def _fail(self, requests: TokenIds[Request], error: ErrorInfo) -> None:
        self._tokens += [TokenOutput.failed(request.key, error) for request in requests]

    def _problem_with(self, request: Request) -> ErrorInfo | None:
        """Why this engine can never compute the request, or None."""
        longest = min(len(request.prompt_ids) + request.sampling.max_tokens, self.spec.max_context)
        capacity = self.spec.num_blocks // len(self._groups) * self.spec.limits.block_size
        if not request.prompt_ids:
            return ErrorInfo("invalid_request", "the prompt is empty")
        if request.num_tokens >= self.spec.max_context:
            return ErrorInfo(
                "invalid_request", f"{request.num_tokens} tokens do not fit the context of {self.spec.max_context}"
            )
        if longest > capacity:
            return ErrorInfo("invalid_request", f"{longest} tokens do not fit the KV pool of {capacity}")
        if request.sampling.grammar and request.sampling.ignore_eos:
            return ErrorInfo("invalid_request", "an answer that keeps to a grammar ends with it: not with ignore_eos")
        token_ids = (*request.prompt_ids, *request.generated_ids)
        if min(token_ids) < 0 or max(token_ids) >= self.spec.vocab_size:
            return ErrorInfo("invalid_request", f"a token id is outside the vocabulary of {self.spec.vocab_size}")
        return None

    def _problem_with_blocks(self, command: Adopt, held: Held) -> ErrorInfo | None:
        """Why these reserved blocks cannot be what the command says, or None."""
        num_tokens, computed = command.request.num_tokens, command.computed
        if self._num_blocks_for(num_tokens) > self._num_blocks_for(held.num_tokens + 1):
            return ErrorInfo("transfer_failed", f"blocks for {held.num_tokens} tokens do not hold {num_tokens}")
        if not 0 <= computed < num_tokens:
            return ErrorInfo("transfer_failed", f"{computed} of {num_tokens} tokens cannot be computed already")
        if computed < held.num_tokens and any(group.window is not None for group in self._groups):
            return ErrorInfo("transfer_failed", f"the window before token {computed} was not reserved")
        return None

    def _problem_with_present(self, sequence: Sequence, computed: int, held: Held) -> ErrorInfo | None:
        """Why the blocks that were here before cannot be this sequence's, or None: its own tokens name them, and it
        never writes to them."""
        self.scheduler.holdings.update_hashes(sequence)
        entries, num_full = self._reserve_entries(held.num_tokens), computed // self.spec.limits.block_size
        for number in chain.from_iterable(held.present):
            group, index = entries[number]
            if index >= num_full:
                return ErrorInfo("transfer_failed", f"block {index} is shared, and would be written to")
            if self.blocks.find(group_name(sequence.hashes[index], group)) != held.block_ids[number]:
                return ErrorInfo("transfer_failed", f"block {index} was named for other tokens than came")
        return None

    def _num_blocks_for(self, num_tokens: int) -> int:
        return num_blocks_for(num_tokens, self.spec.limits.block_size)

    @property
    def _groups(self) -> tuple[Group, ...]:
        return self.spec.limits.groups

    def _live_tables(self) -> dict[Holder, TokenIds[int]]:
        """Whose blocks are whose, from the live sequences, hand-offs and reservations."""
        live: dict[Holder, TokenIds[int]] = {holder: held.block_ids for holder, held in self._held.items()}
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            live[holder_of(sequence)] = sequence.block_ids
        live |= {holder_of(sequence): sequence.block_ids for sequence in self.moves.frozen.values()}
        live[COPY] = self.scheduler.holdings.copy_sources
        return live


def _problem_with_embedding(command: Add) -> ErrorInfo | None:
    """Why this is no embedding that can be computed, if it is to be one, or None."""
    sampling = command.request.sampling
    if not sampling.embed:
        return None
    if sampling.embed not in POOLINGS:
        return ErrorInfo("invalid_request", f"hidden states are not pooled by '{sampling.embed}'")
    if command.handoff or command.siblings or sampling.prompt_logprobs >= 0:
        return ErrorInfo("invalid_request", "an embedding is the only answer to its prompt, and is not handed off")
    return None
