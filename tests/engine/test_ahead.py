"""Steps that are launched before the tokens before them are known: the same answers, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import plan_step
from engine.build import BuiltEngine
from engine.decode_graphs import DecodeGraphs, can_capture, sizes_up_to
from engine.device_runner import DeviceRunner, Launched
from engine.layer_groups import LayersStored
from engine.scheduler import Batch
from engine.step_runner import drive
from engine.types import Abort, Add, Adopt, Command, FinishReason, Key, Reserve, Sampled, StepOutputs
from kernels.triton.backend import TritonAttention
from tests.engine.test_families import FAMILIES
from tests.engine.tiny import random_prompt, random_weights, request, run, tiny_config, tiny_engine
from tests.kernels.interpreted import ON_DEVICE

pytestmark = [
    pytest.mark.skipif(ON_DEVICE, reason="the kernels were loaded for the device"),
    # rows of a graph that hold no sequence compute with what lies there
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]
CONFIG = tiny_config(num_layers=1, vocab_size=24)
WEIGHTS = random_weights(CONFIG, seed=3)


def rerun(work: Callable[[], None]) -> Callable[[], None]:
    """A capture for a processor: what it was given, again."""
    work()
    return work


@dataclass
class Recorder:
    """An AheadRunner that counts. `order` tells launches and collections by their number."""

    inner: DeviceRunner
    order: list[str] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)

    def execute(self, batch: Batch, stored: LayersStored | None = None) -> list[Sampled]:
        return self.collect(self.launch(batch, stored))

    def launch(self, batch: Batch, stored: LayersStored | None = None, after: Launched | None = None) -> Launched:
        self.launched.append(self.inner.launch(batch, stored, after))
        self.order.append(f"launch {len(self.launched) - 1}")
        return self.launched[-1]

    def can_follow(self, launched: Launched, batch: Batch) -> bool:
        return self.inner.can_follow(launched, batch)

    def collect(self, launched: Launched) -> list[Sampled]:
        self.order.append(f"collect {self.launched.index(launched)}")
        return self.inner.collect(launched)


@dataclass
class Script:
    """An inbox: commands for each time it is asked, then the end. Implements engine.step_runner.Inbox."""

    turns: list[list[Command]]
    hidden: int = 0  # asks about news before the next commands are seen

    @property
    def has_news(self) -> bool:
        self.hidden -= 1
        return self.hidden < 0 and bool(self.turns)

    def take(self, block: bool) -> list[Command] | None:
        if block or self.hidden < 0:
            return self.turns.pop(0) if self.turns else None if block else []
        return []


def engine(name: str = "", num_blocks: int = 60) -> BuiltEngine:
    config = FAMILIES[name] if name else CONFIG
    weights = random_weights(config, seed=3) if name else WEIGHTS
    return tiny_engine(config, weights, kernels="triton", prefix_cache=False, num_blocks=num_blocks)


def ahead(built: BuiltEngine, captured: bool = True) -> Recorder:
    seats = built.engine.spec.limits.max_batch_seqs
    graphs = DecodeGraphs(built.runner.model, built.cache, built.runner.block_size, seats, rerun) if captured else None
    return Recorder(DeviceRunner(built.runner, graphs))


def answers(built: BuiltEngine, model: Recorder, turns: list[list[Command]], hidden: int = 0) -> dict[Key, list[int]]:
    told: dict[Key, list[int]] = {}
    ends = list[FinishReason]()

    def emit(outputs: StepOutputs) -> None:
        for output in outputs.tokens:
            assert output.first_index == len(told.setdefault(output.key, [])), "no token twice, none missing"
            told[output.key] += output.token_ids
            ends.extend([output.finish] if output.finish else [])

    drive(built.engine, model, Script([*turns], hidden), emit)
    assert not built.engine.has_work and built.engine.stats().num_leaked_blocks == 0
    assert built.engine.stats().num_free_blocks == built.engine.spec.num_blocks, "all blocks came back"
    return told


REQUESTS = [
    request("greedy", random_prompt(CONFIG, 9, 1), max_tokens=12),
    request("drawn", random_prompt(CONFIG, 3, 2), max_tokens=9, temperature=0.8, seed=7),
    request("cut", random_prompt(CONFIG, 5, 3), max_tokens=10, temperature=1.5, seed=2**64 - 3, top_k=5, top_p=0.8),
    request("rare", random_prompt(CONFIG, 2, 4), max_tokens=7, temperature=1.0, seed=1, min_p=0.2),
]


@pytest.fixture(scope="module")
def wanted() -> dict[Key, list[int]]:
    """Step after step, tokens chosen on the processor."""
    built = engine()
    return run(built.engine, built.runner, REQUESTS)


@pytest.mark.parametrize("captured", [False, True])
def test_tokens_are_those_of_steps_that_wait_for_each_other(captured: bool, wanted: dict[Key, list[int]]) -> None:
    built = engine()
    model = ahead(built, captured)
    assert answers(built, model, [[Add(one) for one in REQUESTS]]) == wanted
    assert model.order[:5] == ["launch 0", "collect 0", "launch 1", "launch 2", "collect 1"]


def test_one_that_ends_early_is_computed_once_too_often_and_no_more(wanted: dict[Key, list[int]]) -> None:
    stop = wanted[REQUESTS[0].key][4]
    first = wanted[REQUESTS[0].key].index(stop)
    ending = request("greedy", REQUESTS[0].prompt_ids, max_tokens=12, stop_token_ids=(stop,))
    built = engine()
    model = ahead(built)
    told = answers(built, model, [[Add(ending), Add(REQUESTS[1])]])
    assert told[ending.key] == wanted[ending.key][: first + 1]
    assert told[REQUESTS[1].key] == wanted[REQUESTS[1].key]


def test_what_needs_the_processor_is_not_launched_ahead(wanted: dict[Key, list[int]]) -> None:
    built = engine()
    model = ahead(built)
    asked = request("greedy", REQUESTS[0].prompt_ids, max_tokens=12, logprobs=1)
    assert answers(built, model, [[Add(asked)]]) == {asked.key: wanted[asked.key]}
    assert model.order == [f"{what} {step}" for step in range(len(model.launched)) for what in ("launch", "collect")]


def test_commands_are_handled_before_more_is_launched(wanted: dict[Key, list[int]]) -> None:
    """An abort in the middle: the others go on, and it has what was told before."""
    built = engine()
    told = answers(built, ahead(built), [[Add(one) for one in REQUESTS], [Abort(REQUESTS[0].key)]], hidden=4)
    assert 0 < len(told[REQUESTS[0].key]) < 12
    for one in REQUESTS:
        assert told[one.key] == wanted[one.key][: len(told[one.key])]
        assert one is REQUESTS[0] or told[one.key] == wanted[one.key]


@settings(deadline=None, max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=4),
    num_blocks=st.integers(7, 14), hidden=st.integers(0, 9), late=st.integers(1, 5),
)  # fmt: skip
def test_under_pressure_too_tokens_are_those_of_one_at_a_time(
    lengths: list[tuple[int, int]], num_blocks: int, hidden: int, late: int
) -> None:
    """Pools so small that sequences are preempted; one comes while others decode."""
    requests = [
        request(str(index), random_prompt(CONFIG, length, index), max_tokens, temperature=0.7, seed=index)
        for index, (length, max_tokens) in enumerate(lengths)
    ]
    alone = engine()
    expected = run(alone.engine, alone.runner, requests)
    built = engine(num_blocks=num_blocks)
    turns: list[list[Command]] = [[Add(one) for one in requests[:-1]], [Add(requests[-1])]]
    assert answers(built, ahead(built, captured=False), turns if requests[:-1] else turns[1:], hidden) == expected


@pytest.mark.parametrize("name", ["gemma3", "qwen3 with biases and a window"])
def test_graphs_serve_layers_with_windows(name: str) -> None:
    """Two groups of layers, contexts beyond the window, and more sequences than a graph's size."""
    config = FAMILIES[name]
    asked = [request(str(length), random_prompt(config, length, length), max_tokens=4) for length in (30, 2, 17)]
    plain, built = engine(name, num_blocks=80), engine(name, num_blocks=80)
    wanted = run(plain.engine, plain.runner, asked)
    assert answers(built, ahead(built), [[Add(one) for one in asked]]) == wanted


def test_a_graph_has_room_for_fewer_sequences_whose_keys_are_cut_more_often() -> None:
    """Three sequences fill a graph of four; of four, tiles would be too many to be cut. Nothing is computed."""
    config = tiny_config(num_layers=1, max_context=4096)
    built = tiny_engine(
        config, random_weights(config, seed=3), kernels="triton", prefix_cache=False, num_blocks=3000, max_batch_seqs=8
    )  # fmt: skip
    attention, engine = built.runner.model.attention, built.engine
    assert isinstance(attention, TritonAttention)
    attention.num_programs = 6
    for name in "abc":
        asked = replace(request(name, random_prompt(config, 3900, 1)), generated_ids=(1,))
        engine.handle(Reserve(asked.key, 3901))
        engine.handle(Adopt(asked, 3900))
    batch = engine.begin()
    assert batch is not None and len(batch.scheduled) == 3
    plan = plan_step(batch, built.cache.layout.groups, built.runner.block_size)
    graphs = DecodeGraphs(built.runner.model, built.cache, built.runner.block_size, 8, lambda work: lambda: None)
    assert graphs.run(plan, None).logits.shape == (3, config.vocab_size)  # it says so if there is no room


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe"])
def test_experts_are_picked_in_steps_that_nobody_waits_for(name: str, captured: bool) -> None:
    """Rows that a graph has to spare have experts, too."""
    config = FAMILIES[name]
    asked = [request(str(length), random_prompt(config, length, 1), max_tokens=4) for length in (5, 9, 2)]
    plain, built = engine(name), engine(name)
    assert can_capture(built.runner.model)
    wanted = run(plain.engine, plain.runner, asked)
    assert answers(built, ahead(built, captured), [[Add(one) for one in asked]]) == wanted


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 512])
def test_sizes_hold_every_batch_with_little_to_spare(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(one for one in sizes if one >= rows)
        assert size - rows <= max(7, rows // 4)
