"""Cores of an engine's own: which it takes, that nobody else takes them, and that its threads keep to them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from engine.config import EngineConfig, ModelSource
from engine.cores import claimed_cores, in_order
from engine.errors import ConfigError
from engine.pool import SharedPool
from engine.setup import EngineSetup, plan_engine
from engine.step_runner import ProcessStepRunner
from engine.types import Add
from kernels.cpu.native.library import load_library
from tests.engine.tiny import request

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
MINE = sorted(os.sched_getaffinity(0))
needs_two = pytest.mark.skipif(len(MINE) < 2, reason="this process has one core")
CLAIM = """
import pathlib, sys
from engine.cores import claimed_cores
with claimed_cores("auto", 1, pathlib.Path(sys.argv[1])) as cores:
    print(*cores, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def same_afterwards() -> Iterator[None]:
    yield
    assert os.sched_getaffinity(0) == set(MINE)


@pytest.mark.parametrize(
    ("siblings", "wanted"),
    [
        ([{0}, {1}, {2}, {3}], [0, 1, 2, 3]),
        ([{0, 1}, {0, 1}, {2, 3}, {2, 3}], [0, 2, 1, 3]),
        ([{0, 2}, {1, 3}, {0, 2}, {1, 3}], [0, 1, 2, 3]),
        ([{0, 9}, {1, 8}, {2, 7}, {3, 6}], [0, 1, 2, 3]),  # the others are not ours
    ],
)
def test_threads_of_one_physical_core_are_taken_last(siblings: list[set[int]], wanted: list[int]) -> None:
    cores = range(len(siblings))
    assert in_order(cores, {core: frozenset(siblings[core]) for core in cores}) == wanted


def test_without_a_wish_nothing_changes(tmp_path: Path) -> None:
    with claimed_cores("any", 64, tmp_path / "none") as cores:
        assert not cores and os.sched_getaffinity(0) == set(MINE)
    assert not (tmp_path / "none").exists()


@needs_two
def test_engines_take_different_cores_and_the_last_does_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = list[tuple[int, ...]]()
    children = [claimer(tmp_path) for _ in MINE]
    try:
        others += [(int(first_line(child)),) for child in children]
        assert sorted(others) == [(core,) for core in MINE]
        with caplog.at_level(logging.WARNING), claimed_cores("auto", 1, tmp_path) as cores:
            assert not cores and os.sched_getaffinity(0) == set(MINE)
        assert "not pinned" in caplog.text
        os.kill(children[0].pid, signal.SIGKILL)
        children[0].wait()
        with claimed_cores("auto", 1, tmp_path) as cores:
            assert cores == others[0] and os.sched_getaffinity(0) == set(cores)
    finally:
        for child in children:
            child.kill()
            child.communicate()


@needs_two
def test_who_cannot_have_all_takes_none(tmp_path: Path) -> None:
    with claimed_cores("auto", 1, tmp_path) as first:
        os.sched_setaffinity(0, MINE)
        with claimed_cores("auto", len(MINE), tmp_path) as second:
            assert not second
        with claimed_cores("auto", len(MINE) - 1, tmp_path) as third:
            assert sorted(first + third) == MINE


def test_locks_of_somebody_else_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with claimed_cores("auto", 1, Path("/proc/1/task")) as cores:  # nobody may write there
        assert not cores


@pytest.mark.parametrize(
    ("cores", "num_threads", "told"), [((4093,), 1, "4093"), ("auto", 4096, "4096"), ((MINE[0],), 2, "2 threads")]
)
def test_cores_that_cannot_be_had_are_told(tmp_path: Path, cores: tuple[int, ...], num_threads: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised, claimed_cores(cores, num_threads, tmp_path):
        pass
    assert raised.value.param == "engine.cores"


@pytest.mark.parametrize("fields", [{"cores": [-1]}, {"cores": "all"}, {"cores": "auto", "runner": "thread"}])
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="cores"):
        EngineConfig.model_validate(fields)


# --- a live engine --------------------------------------------------------------------------------------------


@needs_two
async def test_each_thread_of_a_live_engine_keeps_to_its_own_core(
    tiny_llama: Callable[..., tuple[object, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the engine's process: other tests' engines may have ours
    setup = two_threads(tiny_llama)
    tokens: list[tuple[int, ...]] = []
    for cores in ("any", MINE[:2]):
        one = setup(cores)
        pool = SharedPool(one.layout, one.spec.num_blocks)
        runner = await ProcessStepRunner.start(one, pool, TIMEOUT_S)
        try:
            tokens.append(await generated(runner))
            allowed = [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{runner.pid}/task")]
        finally:
            await runner.stop()
            pool.close()
        if cores == "any":
            assert all(each == set(MINE) for each in allowed)
            continue
        assert all(each <= set(MINE[:2]) for each in allowed)
        if load_library() is not None:  # torch's threads are kept to the two together
            assert {MINE[0]} in allowed and {MINE[1]} in allowed
    assert tokens[0] == tokens[1]


async def test_an_engine_says_which_field_asks_for_too_much(tiny_llama: Callable[..., tuple[object, Path]]) -> None:
    setup = two_threads(tiny_llama)([MINE[0]])
    pool = SharedPool(setup.layout, setup.spec.num_blocks)
    with pytest.raises(ConfigError, match="2 threads cannot have 1 cores"):
        await ProcessStepRunner.start(setup, pool, TIMEOUT_S)
    pool.close()


def two_threads(tiny_llama: Callable[..., tuple[object, Path]]) -> Callable[[object], EngineSetup]:
    _, folder = tiny_llama()

    def made(cores: object) -> EngineSetup:
        fields = {"num_blocks": 64, "block_size": 4, "threads": 2, "cores": cores}
        return plan_engine(ModelSource(name=str(folder)), EngineConfig.model_validate(fields), hash_key=b"key")

    return made


async def generated(runner: ProcessStepRunner) -> tuple[int, ...]:
    runner.send(Add(request("one", range(3, 40), max_tokens=12, ignore_eos=True)))
    tokens: list[int] = []
    async with asyncio.timeout(TIMEOUT_S):
        while len(tokens) < 12:
            for output in (await runner.outputs()).tokens:
                tokens += output.token_ids
    return tuple(tokens)


def claimer(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()
