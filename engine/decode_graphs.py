"""Steps that only decode, as captured graphs: one launch instead of hundreds, of which Python would be the slow part.

A graph is of one batch size, with a place for every number that changes from step to step. A step fills the least graph
that holds it, in one copy; rows that are left over store nothing and are seen by nobody. How long contexts are does not
matter: attention reads its tasks, and how many there are, on the device (kernels/triton/attention.py).
Experts are picked there, too (kernels/triton/routing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from engine.batch import GroupInput, StepInput, calls_of
from engine.kv_cache import KVCache
from engine.models.decoder import Decoder, Results
from engine.planes import Group
from engine.step_plan import StepPlan
from kernels.reference.attention import tile_tokens
from kernels.triton.attention import Parts, Tasks
from kernels.triton.backend import Plan, TritonAttention, TritonBackend, Work, arrays_of
from kernels.triton.tasks import FIELDS, most_parts
from kernels.triton.upload import offsets_of, pack, views

_MOST_SIZES = 512  # of a batch, beyond which launches are a small part of a step

# Runs what it is given once more, on the same tensors.
Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]


class CudaCapture:
    """Graphs that share their memory: no two run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # cuBLAS has a workspace for each

    def __call__(self, work: Callable[[], None]) -> Replay:
        """After a run that compiles what is to be compiled."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Graph:
    """Of `size` rows. buffer: [bytes] on the device, where all of a step's numbers lie; places: where each begins."""

    size: int
    buffer: torch.Tensor
    places: list[int]
    step: StepInput
    replay: Replay


class DecodeGraphs:
    """The graphs of one model over one cache."""

    def __init__(
        self, model: Decoder, cache: KVCache, block_size: int, max_batch_seqs: int, capture: Capture
    ) -> None:  # fmt: skip
        """For a model that `can_capture`. A graph is captured when it is first wanted, or by `prepare`."""
        assert isinstance(model.backend, TritonBackend) and isinstance(model.attention, TritonAttention)
        self._model, self._backend, self._attention = model, model.backend, model.attention
        self._cache = cache
        self._block_size = block_size
        self._capture = capture
        self._sizes = sizes_up_to(min(max_batch_seqs, _MOST_SIZES))
        self._graphs: dict[int, _Graph] = {}
        self._rooms = list[Parts]()  # that captured launches point into
        like = {"dtype": torch.float32, "device": self._backend.device}
        self._logits = torch.empty(self._sizes[-1], model.config.vocab_size, **like)  # of the newest run
        self._no_states = torch.empty(0, model.config.hidden_size, **like)

    def prepare(self, progress: Callable[[int, int], None]) -> None:
        """Capture all, the largest first, whose memory the others share. Tells how many of how many are there."""
        for count, size in enumerate(reversed(self._sizes), start=1):
            self._graph(size)
            progress(count, len(self._sizes))

    def takes(self, plan: StepPlan) -> bool:
        """Does every row decode, and are there graphs of that many?"""
        num_rows = plan.num_tokens
        is_decode = len(plan.sample_rows) == num_rows and not len(plan.state_rows) and (plan.num_new == 1).all()
        return bool(is_decode) and 0 < num_rows <= self._sizes[-1]

    def run(self, plan: StepPlan, tokens: torch.Tensor | None) -> Results:
        """tokens: [num_samples] on the device, in place of the plan's, in the order of what is sampled. What it returns
        is overwritten by the next run."""
        graph = self._graph(next(size for size in self._sizes if size >= plan.num_tokens))
        arrays = self._arrays(plan, graph.size)
        rooms = zip(arrays, pairwise(graph.places), strict=True)
        assert all(array.nbytes <= stop - start for array, (start, stop) in rooms), "a graph has no room for this step"
        host = torch.empty(
            graph.places[len(arrays) - 1] + arrays[-1].nbytes, dtype=torch.uint8,
            pin_memory=self._backend.device.type == "cuda",
        )  # fmt: skip
        pack(arrays, graph.places, host)
        graph.buffer[: len(host)].copy_(host, non_blocking=True)
        if tokens is not None:
            graph.step.token_ids.index_copy_(0, graph.step.sample_rows[: len(tokens)], tokens)
        graph.replay()
        return Results(self._logits[: plan.num_tokens], self._no_states)

    def _arrays(self, plan: StepPlan, size: int) -> list[np.ndarray]:
        """A step's numbers in the order of a graph's buffer; the tables of the last group, whose length differs most,
        come last, so that no more is copied than there is."""
        groups = self._cache.layout.groups
        numbers = [
            self._attention.numbers(group.calls, group.window, self._block_size)[1]
            for group in calls_of(plan, groups, self._block_size)
        ]
        rows = np.concatenate((plan.sample_rows, np.arange(plan.num_tokens, size)))
        fixed = [_padded(plan.token_ids, size, 0), _padded(plan.positions, size, 0)]
        fixed += [_padded(plan.positions % self._block_size, size, 0), rows]
        fixed += [_padded(block_ids, size, -1) for block_ids in np.split(plan.new_blocks, len(groups))]
        return [*fixed, *(array for one in numbers for array in arrays_of(one))]

    def _graph(self, size: int) -> _Graph:
        if size not in self._graphs:
            self._graphs[size] = self._captured(size)
        return self._graphs[size]

    def _captured(self, size: int) -> _Graph:
        empty = self._empty_arrays(size)
        places = offsets_of(empty)
        buffer = torch.zeros(places[-1], dtype=torch.uint8, device=self._backend.device)
        step = self._step(size, views(empty, places, buffer))

        def work() -> None:
            self._logits[:size].copy_(self._model.forward(step, self._cache).logits)

        for group in step.groups:
            group.block_ids.fill_(-1)
        self._rooms.append(self._backend.room(self._most_parts(size), self._attention.num_groups, self._model.heads))
        return _Graph(size, buffer, places, step, self._capture(work))

    def _empty_arrays(self, size: int) -> list[np.ndarray]:
        """Of the greatest shapes that _arrays may give."""
        groups = self._cache.layout.groups
        empty = [np.zeros(size, np.int64) for _ in range(4 + len(groups))]
        tasks, merges = (np.zeros((most, FIELDS), np.int32) for most in (self._most_parts(size) + size, size))
        for group in groups:
            empty += [tasks, merges, np.zeros(2, np.int32), np.zeros(size * self._most_blocks(group), np.int32)]
        return empty

    def _step(self, size: int, tensors: list[torch.Tensor]) -> StepInput:
        groups = self._cache.layout.groups
        token_ids, positions, offsets, sample_rows = tensors[:4]
        block_ids, rest = tensors[4 : 4 + len(groups)], tensors[4 + len(groups) :]
        tiling, part_rows = self._attention.tiling(1), self._attention.num_groups  # tiles are single tokens
        tasks = [Tasks(*rest[first : first + 4]) for first in range(0, 4 * len(groups), 4)]
        plans = [
            Plan((Work(tiling, own, self._most_parts(size), part_rows),), group.window)
            for own, group in zip(tasks, groups, strict=True)
        ]
        inputs = tuple(GroupInput(ids, plan) for ids, plan in zip(block_ids, plans, strict=True))
        none = token_ids[:0]
        return StepInput(size, token_ids, positions, offsets, inputs, sample_rows, size, none)

    def _most_parts(self, size: int) -> int:
        """Of so many sequences, or fewer."""
        return most_parts(size, self._attention.cut(self._attention.tiling(1)), self._model.config.max_context)

    def _most_blocks(self, group: Group) -> int:
        """Of one sequence's row of blocks: whole tiles of keys, in whose middle a window may begin."""
        tile, most = tile_tokens(self._block_size), self._model.config.max_context
        num_keys = most if group.window is None else min(most, group.window)
        return (num_keys // tile + 2) * tile // self._block_size


def can_capture(model: Decoder) -> bool:
    """Is nothing of a step's way through this model decided on the processor?"""
    return model.ranks.share.size == 1 and isinstance(model.backend, TritonBackend)


def sizes_up_to(most: int) -> list[int]:
    """Batch sizes that are captured: a step is padded by a quarter at most, but for the smallest."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32))
    return [*(size for size in sizes if size < most), most]


def _padded(values: np.ndarray, size: int, value: int) -> np.ndarray:
    padded = np.full(size, value, np.int64)
    padded[: len(values)] = values
    return padded
