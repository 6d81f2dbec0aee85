"""The simulated cluster: the real parts in virtual time give the right tokens, lose nothing, and do so reproducibly."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig
from cluster.simulator.calibration import modelled_calibration
from cluster.simulator.chance import Chance
from cluster.simulator.clock import VirtualLoop, run_virtual
from cluster.simulator.log import EventLog
from cluster.simulator.network import LinkTimes
from cluster.simulator.pool import StatePool
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.step_runner import Model, ModelledStepRunner
from cluster.simulator.steps import ModelledRunner
from cluster.simulator.world import SimulatedWorker, World
from engine.engine import Engine
from engine.errors import DeadlineExceeded, StaleIncarnation, SteelyardError
from engine.step_runner import drive
from engine.types import (
    Abort,
    Add,
    Adopt,
    Command,
    FinishReason,
    Key,
    Release,
    Request,
    Reserve,
    Role,
    SamplingParams,
    StepOutputs,
    TokenOutput,
)

ROOT = Path(__file__).resolve().parents[2]
SETTLED_S = 60.0  # longer than a lease, an orphan and any pause
LIMIT_S = 2 * 3600.0


def config(num_prefill: int = 1, num_decode: int = 1, **engine: object) -> ClusterConfig:
    pools = {"prefill": {"workers": num_prefill}, "decode": {"workers": num_decode}}
    small = {"num_blocks": 160, "max_batch_tokens": 256, "prefill_chunk": 128, "max_batch_seqs": 16}
    return ClusterConfig.model_validate({"engine": small | engine, "decode": {"max_pulls": 4}, "pools": pools})


def play(spec: WorldSpec, scenario: Callable[[World], Coroutine[None, None, None]]) -> EventLog:
    """Run a scenario in a world of its own, and see that nothing is left of it."""
    log = EventLog()

    async def main() -> None:
        world = World(spec, log)
        await world.start()
        await scenario(world)
        await asyncio.sleep(SETTLED_S)
        for worker in world.workers.values():
            assert worker.is_quiet(), worker.sides.status()
            assert worker.engine.stats().num_leaked_blocks == 0
        await world.close()
        await asyncio.sleep(SETTLED_S)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert loop.pending() == [asyncio.current_task()], "a task is left"

    run_virtual(main(), LIMIT_S)
    return log


def request(name: str = "r", num_prompt: int = 100, max_tokens: int = 20, timeout_s: float = 600.0) -> Request:
    chance = Chance(0, f"{name}/{num_prompt}")
    prompt = tuple(chance.below(32000) for _ in range(num_prompt))
    return Request(name, prompt, SamplingParams(max_tokens, seed=chance.bits(63)), timeout_s=timeout_s)


def lines(log: EventLog, *words: str) -> list[str]:
    return [line for line in log.to_bytes().decode().splitlines() if all(word in line for word in words)]


# --- one request ------------------------------------------------------------------------------------------------


def test_a_request_goes_through_prefill_pull_and_decode_and_gets_its_own_tokens() -> None:
    spec = WorldSpec(seed=1, config=config())
    asked = request(num_prompt=300)

    async def scenario(world: World) -> None:
        async with aclosing(world.generate(asked)) as outputs:
            seen = [output async for output in outputs]
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        assert [output.first_index for output in seen] == list(range(20))
        assert [name for name, _ in seen[0].stages] == ["route", "prefill_queue", "prefill"]
        assert [name for name, _ in seen[1].stages] == ["transfer", "decode_wait", "steps"]
        assert [name for name, _ in seen[-1].stages] == ["steps", "stalls"]
        assert not any(output.stages for output in seen[2:-1])
        assert seen[-1].finish is FinishReason.LENGTH
        totals = world.workers["decode-0"].sides.status().transfers
        assert (totals.num_pulls, totals.num_failed, totals.num_resumes) == (1, 0, 0)

    log = play(spec, scenario)
    way = [line.split()[2] for line in lines(log) if line.split()[2] in ("submit", "offer", "pull", "release")]
    assert way == ["submit", "offer", "pull", "release"]
    assert len(lines(log, "prefill-0 step")) == 3  # chunks of 128, 128 and 44 tokens
    assert len(lines(log, "decode-0 step")) == 19


def test_its_times_are_those_of_the_model() -> None:
    """300 tokens in three chunks, then one frame's wait at most; a token is a step and the way to the gateway."""
    steps = Roofline(overhead_s=0.01, weights_s=0, context_token_s=0, prefill_token_s=0.001, decode_sequence_s=0.02)
    spec = WorldSpec(seed=1, config=config(), steps=steps, links=LinkTimes(latency_s=0.1, bytes_per_s=1e12))
    times: list[float] = []

    async def scenario(world: World) -> None:
        begun = asyncio.get_running_loop().time()
        async with aclosing(world.generate(request(num_prompt=300, max_tokens=4))) as outputs:
            async for _ in outputs:
                times.append(asyncio.get_running_loop().time() - begun)

    play(spec, scenario)
    prefilled = 0.1 + 0.3 + 3 * 0.01  # the submission's way, and three steps
    assert times[0] == pytest.approx(prefilled + 0.1, abs=1e-4)
    assert times[1] == pytest.approx(prefilled + 0.1 + 0.03 + 0.1, abs=1e-4)  # KV's way, a step, the token's way
    assert times[3] - times[2] == pytest.approx(0.03, abs=1e-6)


def test_the_time_of_a_transfer_is_that_of_the_modelled_model() -> None:
    """1600 tokens of 128 KiB at 200 MB/s take a second, of which the prefill itself hides little."""
    spec = WorldSpec(seed=1, config=config(num_blocks=512), links=LinkTimes(bytes_per_s=200e6))

    async def scenario(world: World) -> None:
        await world.tokens_of(request(num_prompt=1600, max_tokens=2))
        duration_s = world.workers["decode-0"].sides.status().transfers.duration_s
        assert duration_s == pytest.approx(1600 * 2**17 / 200e6, rel=0.1)

    play(spec, scenario)


def test_a_second_turn_moves_only_what_decode_has_not_kept() -> None:
    """The tokens are computed from the bytes in the pool, so that a block that should have come shows in them."""
    spec = WorldSpec(seed=1, config=config(block_size=16))

    async def scenario(world: World) -> None:
        first = request("a", num_prompt=100, max_tokens=30)
        said = await world.tokens_of(first)
        before = world.workers["decode-0"].sides.status().transfers
        second = Request("b", (*first.prompt_ids, *said, *range(20)), first.sampling)
        assert await world.tokens_of(second) == spec.weights.continuation(second)
        after = world.workers["decode-0"].sides.status().transfers
        num_blocks, num_kept = -(-150 // 16), 129 // 16
        assert before.saved_bytes == 0 and before.size_bytes % 7 == 0, "seven blocks"
        block_bytes = before.size_bytes // 7
        assert after.saved_bytes == num_kept * block_bytes
        assert after.size_bytes - before.size_bytes == (num_blocks - num_kept) * block_bytes

    play(spec, scenario)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    spec = WorldSpec(seed=1, config=config())

    async def scenario(world: World) -> None:
        first, second = request("a"), request("a", max_tokens=30)
        await world.tokens_of(first)
        async with aclosing(world.generate(second)) as outputs:
            seen = [output async for output in outputs]
        assert seen[0].cached_tokens == seen[-1].cached_tokens == 96
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(second)

    play(spec, scenario)


# --- the same tokens --------------------------------------------------------------------------------------------


def alone(spec: WorldSpec, requests: list[Request]) -> dict[Key, tuple[int, ...]]:
    """The tokens of one engine that has these requests to itself."""
    engine, pool = Engine(spec.engine_spec()), StatePool(spec.config.engine.block_size, spec.config.engine.num_blocks)
    runner = ModelledRunner(spec.weights, pool)
    tokens: dict[Key, tuple[int, ...]] = {}
    for asked in requests:
        engine.handle(Add(asked))
    while (batch := engine.begin()) is not None:
        engine.finish(batch, runner.execute(batch))
        for output in engine.take_outputs().tokens:
            tokens[output.key] = tokens.get(output.key, ()) + output.token_ids
    return tokens


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"num_blocks": 40},
        {"max_batch_seqs": 2, "num_blocks": 40},
        {"prefix_cache": False},
        {"block_size": 1, "num_blocks": 900},
    ],
    ids=str,
)
def test_the_cluster_gives_the_tokens_of_one_engine(engine: Mapping[str, object]) -> None:
    """Also where blocks are so few that decode preempts, and seats so few that adopted sequences wait."""
    spec = WorldSpec(seed=3, config=config(1, 2, **engine), eos_every=50)
    requests = [request(f"r{index}", 16 * (1 + index % 9), 60) for index in range(30)]

    async def scenario(world: World) -> None:
        together = await asyncio.gather(*map(world.tokens_of, requests))
        expected = alone(spec, requests)
        for asked, tokens in zip(requests, together, strict=True):
            assert tokens == expected[asked.key] == spec.weights.continuation(asked)

    play(spec, scenario)


def test_tokens_that_overtake_the_first_one_wait_for_it() -> None:
    spec = WorldSpec(seed=4, config=config())
    asked = request()

    async def scenario(world: World) -> None:
        world.workers["prefill-0"].port.lags["gateway-0"] = 0.06  # some decode steps
        assert await world.tokens_of(asked) == spec.weights.continuation(asked)

    log = play(spec, scenario)
    assert len({line.split()[0] for line in lines(log, "gateway-0 token ")}) < 20 - 5, "nothing had to wait"


def test_an_abort_that_comes_before_its_offer_still_ends_the_request() -> None:
    spec = WorldSpec(seed=6, config=config())

    async def scenario(world: World) -> None:
        world.gateway_port.lags["prefill-0"] = 0.3  # prefill hears of the end only after the hand-off
        asking = asyncio.create_task(world.tokens_of(request(max_tokens=1500)))
        await asyncio.sleep(0.2)
        asking.cancel()
        await asyncio.sleep(1.5)
        assert world.workers["decode-0"].is_quiet(), "it computes for nobody"

    play(spec, scenario)


def test_a_byte_of_kv_that_is_wrong_gives_other_tokens() -> None:
    """So the right ones above prove that every block was the right one."""
    spec = WorldSpec(seed=5, config=config())
    asked = request(max_tokens=60)

    async def scenario(world: World) -> None:
        async with aclosing(world.generate(asked)) as outputs:
            tokens = [token async for output in outputs for token in spoilt(world.workers["decode-0"], output)]
        assert tuple(tokens[:10]) == spec.weights.continuation(asked)[:10]
        assert tuple(tokens) != spec.weights.continuation(asked)

    def spoilt(worker: SimulatedWorker, output: TokenOutput) -> tuple[int, ...]:
        if output.first_index == 9:
            (sequence,) = worker.engine.scheduler.running
            block_ids = sequence.block_ids[:3]
            record = bytearray(worker.pool.read(1, range(1, 2), block_ids))
            record[::8] = bytes(value ^ 1 for value in record[::8])  # a bit of each token, in one layer of one plane
            worker.pool.write(1, range(1, 2), block_ids, memoryview(record))
        return output.token_ids

    play(spec, scenario)


def test_a_modelled_turn_is_a_turn_of_the_real_loop() -> None:
    """drive() and ModelledStepRunner emit the same records for the same commands."""
    spec = WorldSpec(seed=6, config=config())
    adopted = Request("adopted", tuple(range(32)), SamplingParams(5), generated_ids=(7,))
    commands: list[Command] = [
        Add(request("a", 300, 5)), Add(request("b", 40, 3), handoff=True), Reserve(Key("adopted", 0), 32, 5),
        Adopt(adopted, 32), Add(request("c", 10, 50)), Abort(Key("c", 0)), Release(Key("nobody", 0)),
    ]  # fmt: skip

    def runner() -> ModelledRunner:
        return ModelledRunner(spec.weights, StatePool(16, spec.config.engine.num_blocks))

    inbox = ScriptedInbox(commands)
    real: list[StepOutputs] = []
    calibration = modelled_calibration(spec.engine_spec(), spec.steps)
    drive(Engine(spec.engine_spec()), runner(), inbox, real.append, calibration)

    async def main() -> list[StepOutputs]:
        modelled = ModelledStepRunner(
            "w", Engine(spec.engine_spec()), Model(runner(), spec.steps), EventLog(), lambda _: math.inf
        )
        for command in commands:
            modelled.send(command)
        outputs = [await modelled.outputs() for _ in real]
        await modelled.stop()
        return outputs

    assert [timeless(outputs) for outputs in run_virtual(main())] == [timeless(outputs) for outputs in real]
    shapes = [step.shape for outputs in real for step in outputs.steps]
    assert any(shape.num_decoding and shape.chunks for shape in shapes)
    assert sum(len(outputs.tokens) for outputs in real) > 10


def timeless(outputs: StepOutputs) -> StepOutputs:
    return replace(outputs, steps=tuple(replace(step, step_s=0.0) for step in outputs.steps))


class ScriptedInbox:
    """All commands at once, and no more. Implements engine.step_runner.Inbox."""

    def __init__(self, commands: list[Command]) -> None:
        self._commands: list[Command] | None = commands

    @property
    def has_news(self) -> bool:
        return self._commands is not None

    def take(self, block: bool) -> list[Command] | None:
        if self._commands is None:
            return None if block else []
        taken, self._commands = self._commands, None
        return taken


# --- the same run -----------------------------------------------------------------------------------------------


def load_log(seed: int) -> EventLog:
    """About 200 requests, a third of whom leave early, over 2 + 2 workers with few blocks."""
    spec = WorldSpec(seed, config(2, 2, num_blocks=64), eos_every=100)
    ends: Counter[str] = Counter()

    async def scenario(world: World) -> None:
        await drive_load(world, Chance(seed, "load"), 200, ends)

    log = play(spec, scenario)
    assert sum(ends.values()) == 200
    assert ends.keys() == {"finished", "left", "cancelled"}, ends
    return log


async def drive_load(world: World, chance: Chance, num_requests: int, ends: Counter[str]) -> None:
    """Arrivals at random; each request's tokens are checked as far as they came, and how it ended is counted."""
    tasks: list[asyncio.Task[None]] = []
    for index in range(num_requests):
        tasks.append(asyncio.create_task(one_client(world, chance.fork(f"client {index}"), ends)))
        if chance.below(6) == 0:
            asyncio.get_running_loop().call_later(chance.exponential(0.5), tasks[-1].cancel)
        await asyncio.sleep(chance.exponential(0.04))
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()
    ends["cancelled"] += num_requests - sum(ends.values())


async def one_client(world: World, chance: Chance, ends: Counter[str]) -> None:
    """Half of the prompts begin alike; one client in three leaves after some tokens."""
    shared = tuple(range(10, 10 + chance.below(2) * chance.between(1, 200)))
    prompt = shared + tuple(chance.below(world.spec.vocab_size) for _ in range(chance.between(1, 250)))
    params = SamplingParams(chance.between(1, 60), seed=world.dispatcher.new_seed())
    asked = Request(world.dispatcher.new_request_id(), prompt, params, timeout_s=300.0)
    patience = chance.between(1, 30) if chance.below(3) == 0 else None
    expected, tokens = world.spec.weights.continuation(asked), list[int]()
    how = "finished"
    try:
        async with aclosing(world.generate(asked)) as outputs:
            async for output in outputs:
                assert output.first_index == len(tokens)
                tokens += output.token_ids
                if patience is not None and len(tokens) >= patience and not output.finish:
                    how = "left"
                    break
    except SteelyardError as error:
        how = error.code
    finally:
        assert tuple(tokens) == expected[: len(tokens)]
    assert how != "finished" or tuple(tokens) == expected
    ends[how] += 1


def test_a_load_with_cancellations_leaves_nothing_behind_and_is_the_same_bytes_again() -> None:
    first, again, other = load_log(7), load_log(7), load_log(8)
    assert first.to_bytes() == again.to_bytes()
    assert first.digest() == again.digest() != other.digest()
    assert first.num_records > 4000


def test_another_process_with_other_hashes_writes_the_same_bytes() -> None:
    code = "import sys, tests.cluster.test_simulator as t; sys.stdout.buffer.write(t.load_log(9).to_bytes())"
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "4242")
    ]  # fmt: skip
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1]
    assert outputs[0] == load_log(9).to_bytes()


# --- what fails -------------------------------------------------------------------------------------------------


async def after_tokens(world: World, asked: Request, num_tokens: int, act: Callable[[], None]) -> list[TokenOutput]:
    """All outputs of a request; `act` is called once, when so many tokens have come."""
    seen: list[TokenOutput] = []
    num_seen = 0
    async with aclosing(world.generate(asked)) as outputs:
        async for output in outputs:
            assert output.first_index == num_seen
            seen.append(output)
            if num_seen < num_tokens <= num_seen + len(output.token_ids):
                act()
            num_seen += len(output.token_ids)
    return seen


def serving(world: World, role: Role) -> str:
    """The one worker of this role that has a sequence now."""
    (name,) = (name for name, worker in world.workers.items() if name.startswith(role) and worker.engine.has_work)
    return name


def epochs_of(seen: list[TokenOutput]) -> list[int]:
    return sorted({output.key.epoch for output in seen})


@pytest.mark.parametrize("unlisted", [True, False])
def test_a_decode_worker_that_dies_mid_stream_costs_no_token(unlisted: bool) -> None:
    spec = WorldSpec(seed=10, config=config(1, 2))
    asked = request(max_tokens=40)

    async def scenario(world: World) -> None:
        def die() -> None:
            name = serving(world, Role.DECODE)
            world.kill(name)
            if unlisted:
                world.unlist(name)

        seen = await after_tokens(world, asked, 12, die)
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        assert epochs_of(seen) == [0, 1]
        assert [output.key.epoch for output in seen] == sorted(output.key.epoch for output in seen)

    play(spec, scenario)


def test_the_last_decode_worker_that_dies_leaves_all_to_prefill() -> None:
    spec = WorldSpec(seed=11, config=config())
    asked = request(max_tokens=40)

    async def scenario(world: World) -> None:
        seen = await after_tokens(world, asked, 12, lambda: world.kill("decode-0"))
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        assert epochs_of(seen) == [0, 1]

    log = play(spec, scenario)
    assert len(lines(log, "offer")) == 1


def test_a_prefill_worker_that_dies_before_the_first_token_is_replaced() -> None:
    spec = WorldSpec(seed=12, config=config(2, 1))
    asked = request(num_prompt=1000)

    async def scenario(world: World) -> None:
        asyncio.get_running_loop().call_later(0.03, lambda: world.kill(serving(world, Role.PREFILL)))
        assert await world.tokens_of(asked) == spec.weights.continuation(asked)

    log = play(spec, scenario)
    assert len(lines(log, "submit")) == 2
    assert lines(log, "gateway-0 token ", "epoch=1", "index=0")


def test_a_decode_worker_that_falls_silent_is_left_and_may_come_back() -> None:
    spec = WorldSpec(seed=13, config=config(1, 2))
    asked = request(max_tokens=40)

    async def scenario(world: World) -> None:
        def fall_silent() -> None:
            port = world.workers[serving(world, Role.DECODE)].port
            world.network.silence(port)
            asyncio.get_running_loop().call_later(20, world.network.restore, port)

        seen = await after_tokens(world, asked, 12, fall_silent)
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        assert epochs_of(seen) == [0, 1]
        await asyncio.sleep(30)
        assert all(view.connected for view in world.dispatcher.health().workers)

    play(spec, scenario)


def test_a_short_silence_is_only_a_pause() -> None:
    spec = WorldSpec(seed=14, config=config())
    asked = request(max_tokens=40)

    async def scenario(world: World) -> None:
        def pause() -> None:
            port = world.workers["decode-0"].port
            world.network.silence(port)
            asyncio.get_running_loop().call_later(3, world.network.restore, port)

        seen = await after_tokens(world, asked, 12, pause)
        assert tuple(token for output in seen for token in output.token_ids) == spec.weights.continuation(asked)
        assert epochs_of(seen) == [0]

    play(spec, scenario)


def test_a_deadline_that_passes_ends_the_request_everywhere() -> None:
    spec = WorldSpec(seed=15, config=config())

    async def scenario(world: World) -> None:
        begun = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded, match=r"after \d+ tokens"):
            await world.tokens_of(request(max_tokens=2000, timeout_s=1.5))
        assert asyncio.get_running_loop().time() == begun + 1.5
        await asyncio.sleep(0.02)  # a way and a step
        assert all(worker.is_quiet() for worker in world.workers.values())

    play(spec, scenario)


def test_what_a_gateway_that_died_had_asked_for_is_let_go_after_a_while() -> None:
    spec = WorldSpec(seed=16, config=config(num_blocks=1024))
    orphan_s = spec.config.decode.orphan_s

    async def scenario(world: World) -> None:
        streams = [asyncio.create_task(world.tokens_of(request(f"r{index}", 50, 8000))) for index in range(2)]
        await asyncio.sleep(1)
        world.network.kill(world.gateway_port)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.sleep(orphan_s - 1)
        assert world.workers["decode-0"].engine.stats().num_running == 2
        await asyncio.sleep(2)
        assert world.workers["decode-0"].is_quiet()

    log = play(spec, scenario)
    assert not lines(log, "abort")


def test_a_call_meant_for_an_earlier_life_is_refused() -> None:
    spec = WorldSpec(seed=17, config=config())

    async def scenario(world: World) -> None:
        old = world.dispatcher._connector.connect(world.workers["decode-0"].sides.member)
        world.kill("decode-0")
        world.add_worker(Role.DECODE)
        with pytest.raises(StaleIncarnation, match=r"incarnation decode-0\.2"):
            await old.abort(Key("r", 0), 5.0)
        await asyncio.sleep(1)  # the new life is linked
        asked = request()
        assert await world.tokens_of(asked) == spec.weights.continuation(asked)

    log = play(spec, scenario)
    assert lines(log, "prefill-0 pull caller=decode-0")


@pytest.mark.parametrize("seed", range(4))
def test_under_faults_each_request_has_its_tokens_or_a_typed_error(seed: int) -> None:
    """Workers die, come back, fall silent and lag, while 150 requests come."""
    spec = WorldSpec(100 + seed, config(2, 2, num_blocks=48, max_batch_seqs=3 + 13 * (seed % 2)), eos_every=100)
    ends: Counter[str] = Counter()

    async def scenario(world: World) -> None:
        faults = asyncio.create_task(make_faults(world, Chance(seed, "faults"), 10))
        await drive_load(world, Chance(seed, "load"), 150, ends)
        await faults

    play(spec, scenario)
    assert sum(ends.values()) == 150
    assert ends["finished"] > 60
    typed = {"finished", "left", "cancelled", "worker_lost", "unavailable", "deadline_exceeded", "overloaded"}
    assert ends.keys() <= typed, ends


async def make_faults(world: World, chance: Chance, count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(chance.exponential(1.0))
        name = sorted(world.workers)[chance.below(len(world.workers))]
        port = world.workers[name].port
        match chance.below(4):
            case 0:
                world.network.silence(port)
                await asyncio.sleep(chance.exponential(4.0))
                world.network.restore(port)
            case 1:
                port.lag_s = chance.exponential(0.2)
            case _:
                world.kill(name)
                if chance.below(2):
                    world.unlist(name)
                await asyncio.sleep(chance.exponential(2.0))
                role, index = name.split("-")
                world.add_worker(Role(role), int(index))


# --- long runs --------------------------------------------------------------------------------------------------


def test_an_hour_with_canaries_and_a_request_every_minute() -> None:
    spec = WorldSpec(seed=20, config=config(2, 2))

    async def scenario(world: World) -> None:
        world.dispatcher.canary.start()
        for minute in range(60):
            asked = request(f"r{minute}")
            assert await world.tokens_of(asked) == spec.weights.continuation(asked)
            assert world.dispatcher.health().healthy
            await asyncio.sleep(60)
        await world.dispatcher.canary.stop()

    log = play(spec, scenario)
    assert float(lines(log)[-1].split()[0]) > 3500
