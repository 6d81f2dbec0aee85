"""`steelyard plan`: which tensor-parallel size for each phase, which ratio and how many GPUs keep the targets.

1. workload, service times and memory are read and checked, and the place of the report, before anything runs;
2. the search simulates clusters (cluster/simulator/planning), while a bar says what is tried;
3. the answer is printed, and a page of plots is written. Ctrl-C ends it, and nothing is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.interrupt import deferred_interrupt
from cluster.simulator.network import LinkTimes
from cluster.simulator.planning.memory import Memory
from cluster.simulator.planning.page import page
from cluster.simulator.planning.placements import best_phase
from cluster.simulator.planning.search import Affinity, Plan, Question, Tried, search
from cluster.simulator.planning.targets import Target, Verdict, parse_targets
from cluster.simulator.planning.trials import Trials, WorkerKind, mean_rate
from cluster.simulator.service_times.load import load_service_times, tensor_parallel_sizes
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.workload import Workload
from engine.config import EngineConfig
from engine.errors import ConfigError, SteelyardError

INTERRUPTED = 130
GPU_ENGINE = EngineConfig(block_size=64, max_batch_tokens=8192, prefill_chunk=8192, max_batch_seqs=256)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The command line. `sizes`: tensor-parallel sizes to choose from; empty: all that the service times know."""

    trace: str
    slo: str
    num_gpus: int
    service_times: str
    rate: float | None
    sizes: str
    affinity: Affinity
    gpus_per_node: int
    gpu_memory_gb: float
    weights_gb: float
    kv_token_bytes: int
    link_gb_per_s: float
    node_link_gb_per_s: float
    num_requests: int
    seed: int
    output: Path


def run_plan(config: ClusterConfig | None, options: PlanOptions, console: Console) -> int:
    """Returns the exit code. Raises ConfigError for what cannot be planned, before it begins."""
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise ConfigError(f"--output: a file cannot be made at {options.output}")
    targets = parse_targets(options.slo)
    kinds = _kinds(options)
    workload = _workload(options)
    question = Question(
        options.rate or mean_rate(workload), options.num_gpus, options.gpus_per_node, options.affinity, kinds,
        LinkTimes(bytes_per_s=options.node_link_gb_per_s * 1e9),
    )  # fmt: skip
    links = LinkTimes(bytes_per_s=options.link_gb_per_s * 1e9)
    config = config or ClusterConfig(engine=GPU_ENGINE)
    try:
        with deferred_interrupt() as check, _progress(console) as (tell, on_trial), _many_simulations():
            trials = Trials(
                config, workload, options.num_requests, targets, links, options.kv_token_bytes, options.seed, on_trial,
                on_look=check,
            )  # fmt: skip
            plan = search(question, trials, tell)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is written")
        return INTERRUPTED
    answers = dict(_answers(plan, question, targets))
    _print(console, plan, targets, answers, kinds)
    try:
        facts = {"workload": f"{workload.name}, {options.num_requests} or more requests at a time"} | answers
        options.output.write_text(page(f"Plan for {workload.name}", facts, plan, targets), encoding="utf-8")
    except OSError as error:
        raise SteelyardError(f"{options.output}: cannot be written: {error.strerror}") from error
    console.print(Text(f"report   {options.output}"), soft_wrap=True)
    return 0 if plan.fewest else 1


# --- what is asked --------------------------------------------------------------------------------------------


def _kinds(options: PlanOptions) -> Mapping[int, WorkerKind]:
    known = tensor_parallel_sizes(options.service_times) or (1,)
    memory = Memory(options.gpu_memory_gb * 1e9, options.weights_gb * 1e9, options.kv_token_bytes)
    most = min(options.gpus_per_node, options.num_gpus)
    kinds = {
        size: WorkerKind(load_service_times(options.service_times, size), memory.kv_tokens(size))
        for size in _sizes(options.sizes) or known
        if size <= most and memory.kv_tokens(size)
    }
    if not kinds:
        raise ConfigError(
            f"no tensor-parallel size fits: {options.weights_gb:g} GB of weights, {options.gpu_memory_gb:g} GB per "
            f"GPU, at most {most} GPUs per worker, service times of {', '.join(map(str, known))}"
        )
    return kinds


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise ConfigError(f"--tensor-parallel: expected sizes such as 1,2,4, got {text!r}")
    return sizes


def _workload(options: PlanOptions) -> Workload:
    workload = load_workload(options.trace, options.seed)
    first = workload.arrivals[: options.num_requests]
    if first[0].at_s == first[-1].at_s:
        raise ConfigError(f"{options.trace}: its first {len(first)} requests come at once, which is no rate")
    return workload


# --- while it runs --------------------------------------------------------------------------------------------


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Callable[[str], None], Callable[[Verdict], None]]]:
    """What is tried, and how many simulations there were: a bar on a terminal, elsewhere a line for each."""
    if not console.is_terminal:
        yield lambda what: console.print(Text(what), soft_wrap=True), lambda _: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.completed:.0f} simulations · {task.description} ·"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what), lambda _: progress.advance(task)


@contextmanager
def _many_simulations() -> Iterator[None]:
    """The parts that are simulated warn of workers that come and go."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# --- when it is done ------------------------------------------------------------------------------------------


def _answers(plan: Plan, question: Question, targets: tuple[Target, ...]) -> Iterator[tuple[str, str]]:
    sizes = [best_phase(found).tensor_parallel for found in (plan.prefill, plan.decode)]
    yield "sizes", f"TP{sizes[0]} for prefill and TP{sizes[1]} for decode do most per GPU, each phase alone"
    asked = f"{question.rate:.3g} requests/s"
    if plan.fewest:
        yield "answer", f"{plan.fewest.num_gpus} GPUs serve {asked}: {_told(plan.fewest, targets)}"
    else:
        yield "answer", f"{question.num_gpus} GPUs do not serve {asked} within the targets"
    if plan.most:
        most = f"{plan.most.rate:.3g} requests/s on {plan.most.num_gpus} GPUs"
        yield "most", f"{most}: {_told(plan.most, targets)}"
    shown = [tried for tried in (plan.fewest, plan.most) if tried]
    if any(tried.verdict.extrapolated for tried in shown):
        share = max(tried.verdict.extrapolated for tried in shown)
        yield "beware", f"{share:.0%} of the steps are beyond what the service times were measured for"
    if any(tried.verdict.keeps and tried.verdict.is_short for tried in plan.tried):
        yield (
            "note",
            "the workload is too short to tell what some clusters would do for longer; a longer one may find more",
        )


def _told(tried: Tried, targets: tuple[Target, ...]) -> str:
    nodes = f"{tried.num_nodes} nodes of " if tried.num_nodes > 1 else ""
    values = [
        f"{target.metric.upper()} {value * 1e3:.0f} of {target.limit_s * 1e3:g} ms"
        for target, value in zip(targets, tried.verdict.values_s, strict=True)
    ]
    kept = f"all limits kept by {tried.verdict.attained:.1%}"
    return f"{nodes}{tried.split} (prefill + decode workers); {', '.join(values)}; {kept}"


def _print(
    console: Console, plan: Plan, targets: tuple[Target, ...], answers: Mapping[str, str],
    kinds: Mapping[int, WorkerKind],
) -> None:  # fmt: skip
    phases = Table("phase alone", "size", "KV tokens", "requests/s", "per GPU", box=None, pad_edge=False)
    for name, found in (("prefill", plan.prefill), ("decode", plan.decode)):
        for one in found:
            rates = (f"{one.goodput:.3g}", f"{one.per_gpu:.3g}")
            phases.add_row(name, f"TP{one.tensor_parallel}", f"{kinds[one.tensor_parallel].kv_tokens:,}", *rates)
    names = [f"P{target.quantile * 100:g} {target.metric.upper()} ms" for target in targets]
    clusters = Table("GPUs", "prefill + decode", "requests/s", *names, "all kept by", "", box=None, pad_edge=False)
    for tried in plan.tried:
        values = (f"{value * 1e3:.0f}" for value in tried.verdict.values_s)
        kept = "no" if not tried.verdict.keeps else "too short" if tried.verdict.is_short else "yes"
        row = (str(tried.split.num_gpus), str(tried.split), f"{tried.rate:.3g}")
        clusters.add_row(*row, *values, f"{tried.verdict.attained:.1%}", kept)
    for table in (phases, clusters):
        console.print(table)
        console.print()
    for name, words in answers.items():
        console.print(Text(f"{name:<8} {words}"), soft_wrap=True)
