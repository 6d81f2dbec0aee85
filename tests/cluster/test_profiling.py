"""A profile of a live cluster: what is planned, what follows from what was observed, and all of it over real HTTP."""

from __future__ import annotations

import asyncio
import re
from functools import partial
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.client import ApiError
from cluster.profiling import command
from cluster.profiling import measure as measuring
from cluster.profiling.live import LiveCluster, Served
from cluster.profiling.measure import covers, measure
from cluster.profiling.observed import Probe, gateway_s_of, link_of, slowdown_of, token_s_of
from cluster.profiling.plan import LONGEST, LONGEST_S, SHORTEST, Plan, make_plan
from cluster.profiling.progress import profile_progress
from cluster.simulator.host import Slowdown
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.profiled import profiled_world
from cluster.simulator.results import RequestResult
from cluster.simulator.service_times.profile import read_profile
from cluster.simulator.service_times.roofline import Roofline
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.workload import Arrival, Workload
from engine.step_shape import Chunk, StepRecord, StepShape, decode_shape
from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import MAX_CONTEXT, write_tiny_model

PLAN = Plan((16, 64, 128), ((32, 9), (96, 20)), (8, 96), (4, 2, 1), 3, 20, (30, 40), 4, 2)


@pytest.fixture
def overrides(tmp_path: Path) -> dict[str, object]:
    return {"model.name": str(write_tiny_model(tmp_path / "model")), "engine.runner": "thread"}


# --- plans ----------------------------------------------------------------------------------------------------


def test_a_plan_fits_the_context_and_the_speed() -> None:
    slow, fast = make_plan(8192, 1 / 270, 0.075), make_plan(131072, 1e-5, 0.008)
    assert slow.prompts == (16, 32, 64, 128, 256, 512, 1024)
    assert slow.longest / 270 <= LONGEST_S
    assert slow.batch_sizes == (16, 8, 4, 2, 1)
    assert slow.contexts == (64, 256, 768)
    assert fast.longest == LONGEST
    assert fast.batch_sizes[0] == 64


@pytest.mark.parametrize("max_context", [40, 100, 4096])
@pytest.mark.parametrize("speed", [1e-9, 1.0, 100.0])
def test_a_plan_stays_inside_of_the_context_at_any_speed(max_context: int, speed: float) -> None:
    plan = make_plan(max_context, speed, speed)
    assert SHORTEST <= plan.longest <= max_context // 2
    assert all(1 <= context <= plan.longest for context in plan.contexts)
    assert all(num_cached + num_new <= plan.longest for num_cached, num_new in plan.cached)
    assert plan.batch_beside in plan.batch_sizes


# --- what follows from what was observed ----------------------------------------------------------------------

LATENCY_S, BYTES_PER_S, GATEWAY_S, TOKEN_S = 0.004, 2.5e8, 0.01, 0.002


def probe(late_bytes: int, num_decoded: int = 1, noise_s: float = 0.0) -> Probe:
    first_s = GATEWAY_S + 2 * LATENCY_S + 0.5
    gap_s = LATENCY_S + late_bytes / BYTES_PER_S + TOKEN_S * (num_decoded - 1) + noise_s
    return Probe(first_s, first_s + gap_s + 0.1 * num_decoded, 0.5, 0.1 * num_decoded, num_decoded, late_bytes)


def test_latency_bandwidth_and_what_the_gateway_takes_are_found_among_outliers() -> None:
    probes = [probe(size * 10**6) for size in (1, 2, 3, 5, 8, 12)] + [probe(4 * 10**6, noise_s=0.3), probe(10**6, 11)]
    link = link_of(probes)
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((LATENCY_S, BYTES_PER_S), rel=0.05)
    assert gateway_s_of(probes, link) == pytest.approx(GATEWAY_S, rel=0.05)
    assert token_s_of(probes, link) == pytest.approx(TOKEN_S, rel=0.05)


def test_times_too_short_to_tell_are_never_below_zero() -> None:
    probes = [Probe(0.1, 0.3, 0.11, 0.21, 1, size) for size in (100, 200)]
    link = link_of(probes)
    assert link.latency_s == gateway_s_of(probes, link) == token_s_of(probes, link) == 0
    assert link.bytes_per_s > 1e9


def test_the_slowdown_is_of_all_steps_of_a_phase_together() -> None:
    alone = Roofline()
    chunks, batches = StepShape((Chunk(0, 128),)), [decode_shape([100] * 4), decode_shape([10] * 5)]
    chunk_s, *batch_s = map(alone.step_s, (chunks, *batches))
    beside = [
        StepRecord(chunks, 1.2 * chunk_s), StepRecord(chunks, 1.4 * chunk_s),
        StepRecord(batches[0], 1.5 * batch_s[0]), StepRecord(batches[1], 1.5 * batch_s[1]),
    ]  # fmt: skip
    both = slowdown_of(beside, alone)
    assert (both.prefill, both.decode) == pytest.approx((1.3, 1.5))
    assert slowdown_of(beside[:1], alone).decode == 1.0, "nothing was met"
    assert slowdown_of([StepRecord(chunks, chunk_s / 2)], alone) == Slowdown(1.0, 1.0), "nobody gets faster by company"


@pytest.mark.parametrize(
    ("chunks", "covered"),
    [
        ([[(0, 64)], [(64, 36)]], True),
        ([[(32, 68)]], True),
        ([[(0, 64)]], False),  # its end is missing
        ([[(0, 8)], [(0, 64)], [(64, 36)]], False),  # a canary's
        ([[(0, 64)], [(64, 36), (0, 8)]], False),
        ([], False),
    ],
)
def test_steps_are_those_of_one_prompt_alone_or_do_not_count(
    chunks: list[list[tuple[int, int]]], covered: bool
) -> None:
    records = [StepRecord(StepShape(tuple(Chunk(*each) for each in step)), 0.1) for step in chunks]
    assert covers(records, 100) is covered


# --- the command ----------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.mark.parametrize("output", [".", "nowhere/profile.yaml"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(output: str) -> None:
    done = invoke("--url", "http://127.0.0.1:9", "--output", output)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: --output:")


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    done = invoke("--output", str(tmp_path / "profile.yaml"))
    assert (done.exit_code, done.stdout) == (130, "interrupted; nothing was written\n")
    assert not list(tmp_path.iterdir())


async def test_the_command_writes_a_profile_that_a_simulation_runs_with(
    overrides: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure", partial(measure, plan=PLAN, budget_s=0.1))
    output, written = tmp_path / "profile.yaml", StringIO()
    async with local_cluster(overrides) as local:
        console = Console(file=written, width=200)
        await asyncio.to_thread(command.profile, local.url, output, "one thread", console)
    profile = read_profile(output)
    assert (profile.model, profile.device, profile.kv_token_bytes) == ("model", "one thread", 256)
    assert [step.step_ms for step in profile.steps if step.chunks == [[0, 64]]]
    lines = written.getvalue().splitlines()
    assert lines[0] == "  0% warming up"
    assert "profile.yaml: model on one thread" in lines[-6]
    assert re.search(r"so many sequences +1: \d+ ms, 2: \d+ ms, 4: \d+ ms$", lines[-4])
    spec = profiled_world(WorldSpec(seed=1, config=local.config, plain=True), profile, one_host=True)
    result = await asyncio.to_thread(simulate, spec, Workload("one", (Arrival(0.0, 64, 3),)), EventLog())
    (one,) = result.requests
    prompt_s = spec.steps.step_s(StepShape((Chunk(0, 64),)))
    assert one.ttft_s == pytest.approx(prompt_s + spec.gateway_s + 2 * spec.links.latency_s, rel=0.05)


def test_what_the_gateway_takes_is_before_the_first_token_and_of_each_after_it() -> None:
    def play(gateway_s: float, token_s: float) -> RequestResult:
        spec = WorldSpec(seed=1, plain=True, gateway_s=gateway_s, token_s=token_s)
        return simulate(spec, Workload("one", (Arrival(0.0, 64, 5),)), EventLog()).requests[0]

    without, with_both = play(0.0, 0.0), play(0.5, 0.25)
    assert without.ttft_s and with_both.ttft_s and without.tpot_s and with_both.tpot_s
    assert with_both.ttft_s - without.ttft_s == pytest.approx(0.5)
    assert with_both.tpot_s - without.tpot_s == pytest.approx(0.25)


def test_progress_is_a_line_for_each_part_in_a_log_and_a_bar_on_a_terminal() -> None:
    for is_terminal in (False, True):
        written = StringIO()
        with profile_progress(Console(file=written, force_terminal=is_terminal, width=80)) as report:
            report("round 1: prompts", 0.25)
        assert "round 1: prompts" in written.getvalue()
        assert (written.getvalue() == " 25% round 1: prompts\n") is not is_terminal


def test_a_device_is_named_where_it_can_be_known() -> None:
    assert command.device_at("http://127.0.0.1:8000") == command.device_at("http://localhost:8000/v1")
    assert command.device_at("http://10.0.0.7:8000") == "where 10.0.0.7 is"


# --- a live cluster -------------------------------------------------------------------------------------------


async def test_a_round_measures_prompts_batches_and_both_workers_at_once(overrides: dict[str, object]) -> None:
    told: list[tuple[str, float]] = []
    async with local_cluster(overrides) as local, LiveCluster(local.url) as cluster:
        served, observed = await measure(cluster, lambda *what: told.append(what), PLAN, budget_s=0.1)
        assert served == Served("model", MAX_CONTEXT, 256)
        assert (await cluster.health()).num_live_requests == 0
        assert all(worker.num_running == 0 for worker in (await cluster.health()).workers)
    shapes = {record.shape for record in observed.alone}
    assert {StepShape((Chunk(0, size),)) for size in (16, 64, 128)} <= shapes
    assert {Chunk(0, 20), Chunk(0, 30)} <= {chunk for shape in shapes for chunk in shape.chunks}
    assert {StepShape((Chunk(32, 9),)), StepShape((Chunk(96, 20),))} <= shapes
    for size in PLAN.batch_sizes:
        assert sum(shape.num_decoding == size and not shape.chunks for shape in shapes) >= PLAN.num_steps
    assert {0, 2} <= {record.shape.num_decoding for record in observed.beside} <= {0, 1, 2, 3, 4}
    assert {Chunk(0, 30), Chunk(0, 40)} <= {chunk for record in observed.beside for chunk in record.shape.chunks}
    assert [probe.num_decoded for probe in observed.probes] == [1] * 5 + [9, 9]
    assert all(probe.first_s > probe.prefill_s > 0 < probe.decode_s for probe in observed.probes)
    parts = ("prompts", "prompts at once", "decoding after 8 tokens", "decoding after 96 tokens")
    assert [name for name, _ in told] == ["warming up", *(f"round 1: {part}" for part in parts)]
    assert all(0 <= share <= 1 for _, share in told)


async def test_a_cluster_that_serves_others_is_not_measured(
    overrides: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "QUIET_S", 0.2)
    async with local_cluster(overrides) as local, LiveCluster(local.url) as cluster:
        other = asyncio.create_task(cluster.answer("model", [30] * 10, 4000))
        await until_live(cluster)
        with pytest.raises(ApiError, match="1 other requests"):
            await measure(cluster, lambda *_: None, PLAN)
        other.cancel()


async def until_live(cluster: LiveCluster) -> None:
    async with asyncio.timeout(10):
        while not (await cluster.health()).num_live_requests:
            pass


async def test_only_one_worker_of_each_role_is_measured(overrides: dict[str, object]) -> None:
    async with local_cluster(overrides, num_decode=2) as local, LiveCluster(local.url) as cluster:
        with pytest.raises(ApiError, match=r"one prefill and one decode worker; .* has: .*decode-1"):
            await cluster.served()


FIRST, LAST = 'data: {"choices": [{"text": "a"}]}\n\n', 'data: {"error": {"message": "shutting down"}}\n\n'


@pytest.mark.parametrize(
    ("status", "text", "told"),
    [(400, '{"error": {"message": "too long"}}', "too long"), (200, FIRST + LAST, "shutting down"),
     (200, FIRST, "broke an answer off"), (502, "<html>", "HTTP 502")],
)  # fmt: skip
async def test_a_refusal_and_an_answer_that_breaks_off_are_told(status: int, text: str, told: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    async with LiveCluster("http://gateway", transport) as cluster:
        with pytest.raises(ApiError, match=told):
            await cluster.answer("model", [1, 2], 2)


async def test_who_is_no_gateway_or_an_older_one_is_told_apart() -> None:
    def older(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"error": {"message": "There is no such route"}})

    async with LiveCluster("http://gateway", httpx.MockTransport(older)) as cluster:
        with pytest.raises(ApiError, match="another version"):
            await cluster.new_steps()
        with pytest.raises(ApiError, match="does not answer as a Steelyard gateway"):
            await cluster.health()
    async with LiveCluster("http://127.0.0.1:9") as cluster:
        with pytest.raises(ApiError, match=r"nothing listens at http://127\.0\.0\.1:9"):
            await cluster.served()
