"""Engines in all ways that must not change a token, and the comparison of each with the oracle.

1. `Combination` is one way; `all_pairs` and `all_combinations` list them.
2. `EngineLab` loads the weights once and makes a fresh engine and KV pool for each combination, unused slots poisoned
   with NaN, the free list shuffled if so wanted.
3. `EngineLab.check` first computes the prompts' beginnings, which the prefix cache may then find, and compares what
   follows after the whole prompts.
4. `Tally` counts the outcomes; it is what results are reported from.

Engines have one thread each, and `processes` gives a process for each core that is ours: on a busy machine threads of
one product wait for each other, sometimes for a hundred times what it takes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cache

import torch

from engine.config import EngineConfig, ModelSource
from engine.engine import Engine, ModelRunner
from engine.kv_cache import KVCache
from engine.model_runner import TorchRunner, build_model
from engine.models.decoder import Weights
from engine.models.loader import load_config
from engine.models.store import resolve
from engine.models.weights import load_weights
from engine.scheduler import Batch
from engine.setup import plan_engine
from engine.types import Add, EngineStats, FinishReason, Request, SamplingParams
from tests.oracle.compare import Expected, Verdict, compare
from tests.oracle.prompts import MODEL, WHOLE_BLOCKS, OraclePrompt
from tests.oracle.reference import NUM_NEW

WHOLE = 2048  # a chunk that holds every prompt
MOST_SHARED = 320  # tokens of a prompt's beginning that are computed beforehand
SHUFFLE_SEED = 2025
MAX_PROCESSES = 16


@dataclass(frozen=True, slots=True)
class Combination:
    """One way to run an engine. Units: tokens, sequences."""

    chunk: int
    batch: int
    prefix_cache: bool
    shuffled: bool
    block_size: int

    def __str__(self) -> str:
        chunk = "whole" if self.chunk == WHOLE else f"{self.chunk}"
        cache, order = "on" if self.prefix_cache else "off", "shuffled" if self.shuffled else "ordered"
        return f"chunk {chunk}, batch {self.batch}, prefix cache {cache}, blocks of {self.block_size} {order}"


FACTORS: Mapping[str, Sequence[int]] = {
    "chunk": (1, 7, 64, WHOLE),
    "batch": (1, 4, 16),
    "prefix_cache": (True, False),
    "shuffled": (True, False),
    "block_size": (16, 32),
}
assert list(FACTORS) == [one.name for one in fields(Combination)]


def all_combinations(**fixed: int) -> list[Combination]:
    """The product of all factors, those in `fixed` held."""
    values = [(fixed[name],) if name in fixed else options for name, options in FACTORS.items()]
    return [Combination(*row) for row in itertools.product(*values)]  # type: ignore[arg-type]


def all_pairs() -> list[Combination]:
    """Few combinations that hold every pair of values of any two factors: greedily the one with the most new pairs."""
    candidates = all_combinations()
    missing = set(itertools.chain.from_iterable(map(pairs_of, candidates)))
    chosen: list[Combination] = []
    while missing:
        best = max(candidates, key=lambda one: len(missing & pairs_of(one)))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def pairs_of(one: Combination) -> set[tuple[tuple[str, int], ...]]:
    return set(itertools.combinations([(name, getattr(one, name)) for name in FACTORS], 2))


# --- running --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one request."""

    tokens: tuple[int, ...]
    finish: FinishReason


def run(engine: Engine, model: ModelRunner, requests: Iterable[Request]) -> dict[str, Result]:
    """Drive an engine until all of these are done; by request id."""
    for request in requests:
        engine.handle(Add(request))
    tokens: dict[str, list[int]] = {}
    results: dict[str, Result] = {}
    batch: Batch | None = None
    while (batch := engine.begin()) is not None:
        engine.finish(batch, model.execute(batch))
        for output in engine.take_outputs().tokens:
            assert output.error is None, output.error
            so_far = tokens.setdefault(output.key.request_id, [])
            so_far += output.token_ids
            if output.finish:
                results[output.key.request_id] = Result(tuple(so_far), output.finish)
    return results


class EngineLab:
    """One loaded model for many engines."""

    def __init__(self, name: str = MODEL, weights: Weights | None = None) -> None:
        """`weights` are the model's own, where they are loaded already; the model takes them out of the dict."""
        torch.set_num_threads(1)
        files = resolve(name)
        config = load_config(files)
        weights = weights or load_weights(files, config, torch.float32)
        self._source = ModelSource(name=name)
        with torch.inference_mode():
            # Both block sizes give attention tiles of 128, so that one measured ladder fits both.
            self._model = build_model(config, weights, WHOLE_BLOCKS, batch_invariant=True)

    def make(self, one: Combination, num_blocks: int) -> tuple[Engine, TorchRunner]:
        """A fresh engine and its model over a pool of NaN."""
        config = EngineConfig(
            block_size=one.block_size, num_blocks=num_blocks, prefill_chunk=one.chunk, max_batch_seqs=one.batch,
            max_batch_tokens=max(512, one.chunk), prefix_cache=one.prefix_cache,
        )  # fmt: skip
        setup = plan_engine(self._source, config, b"key of the oracle tests")
        cache = KVCache(setup.layout, num_blocks, "cpu", None)
        cache.fill(float("nan"))
        engine = Engine(setup.spec)
        if one.shuffled:
            order = list(engine.blocks._free)
            random.Random(SHUFFLE_SEED).shuffle(order)
            engine.blocks._free = deque(order)
        return engine, TorchRunner(self._model, cache, one.block_size)

    def check(self, one: Combination, cases: Sequence[Case]) -> tuple[Tally, EngineStats]:
        """Run the cases, all queued at once, and compare."""
        engine, model = self.make(one, sum(-(-case.num_tokens // one.block_size) + 1 for case in cases))
        beginnings = [case.beginning(index) for index, case in enumerate(cases) if one.prefix_cache]
        run(engine, model, [request for request in beginnings if request is not None])
        results = run(engine, model, [case.request(f"{index}") for index, case in enumerate(cases)])
        tally = Tally()
        for index, case in enumerate(cases):
            tally.count(case.prompt, case.rest, results[f"{index}"].tokens, str(one))
        return tally, engine.stats()


@cache
def lab() -> EngineLab:
    """This process's."""
    return EngineLab()


def check_engine(one: Combination, cases: Sequence[Case]) -> tuple[Tally, EngineStats, float]:
    """The same in another process; with how many seconds it took."""
    engines = lab()
    begun = time.perf_counter()
    return *engines.check(one, cases), time.perf_counter() - begun


def processes() -> ProcessPoolExecutor:
    """One for each core that no other of pytest's processes has; each has the weights and a KV pool of its own, up to
    1.5 GB."""
    spawning = multiprocessing.get_context("spawn")
    num_runners = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    count = min(max(1, (os.cpu_count() or 1) // num_runners), MAX_PROCESSES)
    return ProcessPoolExecutor(count, mp_context=spawning, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A pool's processes wait for work for ever, even if who would send it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the oracle's answer, how many of its tokens are known already, as after a move to this engine, and how
    many of them are wanted in all."""

    prompt: OraclePrompt
    expected: Expected
    num_known: int = 0
    num_new: int = NUM_NEW

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.ids) + self.num_new

    @property
    def rest(self) -> Expected:
        return self.expected.ending_at(self.num_new).starting_at(self.num_known)

    def request(self, request_id: str) -> Request:
        params = SamplingParams(max_tokens=self.num_new, temperature=0.0, ignore_eos=True)
        return Request(request_id, self.prompt.ids, params, generated_ids=self.expected.tokens[: self.num_known])

    def beginning(self, index: int) -> Request | None:
        """A request that leaves the prompt's first whole blocks in the prefix cache."""
        length = min(MOST_SHARED, len(self.prompt.ids)) // WHOLE_BLOCKS * WHOLE_BLOCKS
        if not length:
            return None
        return Request(f"beginning of {index}", self.prompt.ids[:length], SamplingParams(max_tokens=1, temperature=0.0))


# --- counting -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Outcomes of comparisons. Near ties and wrong ones are listed."""

    num_equal: int = 0
    near_ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_compared(self) -> int:
        return self.num_equal + len(self.near_ties) + len(self.wrong)

    def count(self, prompt: OraclePrompt, expected: Expected, got: Sequence[int], where: str) -> None:
        outcome = compare(expected, got)
        self.num_equal += outcome.verdict is Verdict.EQUAL
        text = f"{where}: {prompt}: {outcome.details}"
        if outcome.verdict is Verdict.NEAR_TIE:
            self.near_ties.append(text)
        elif outcome.verdict is Verdict.WRONG:
            self.wrong.append(text)

    def add(self, other: Tally) -> None:
        self.num_equal += other.num_equal
        self.near_ties += other.near_ties
        self.wrong += other.wrong

    def __str__(self) -> str:
        lines = [f"{self.num_equal} of {self.num_compared} equal", *self.near_ties, *self.wrong]
        return "\n".join(lines)


def fitting(cases: Iterable[Case], longest: int) -> list[Case]:
    """The cases whose prompts have at most so many tokens."""
    return [case for case in cases if len(case.prompt.ids) <= longest]
