"""`steelyard simulate`: a workload on a simulated cluster, with a table, a page of plots, and files for programs.

1. workload and service times are loaded, and the places of all files are checked, before anything runs;
2. the cluster of the configuration plays it in virtual time, while a bar says how far it is;
3. what was found is printed and written. Ctrl-C ends it at the next look at the workers, and nothing is written.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import ClusterConfig
from cluster.interrupt import deferred_interrupt
from cluster.simulator.log import EventLog
from cluster.simulator.play import simulate
from cluster.simulator.profiled import profiled_world
from cluster.simulator.report.page import About, in_ms, in_percent, page
from cluster.simulator.report.summary import Summary, Targets, summarise
from cluster.simulator.results import SimulationResult
from cluster.simulator.service_times.load import load_service_times
from cluster.simulator.service_times.profile import read_profile
from cluster.simulator.spec import WorldSpec
from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.workload import Workload
from engine.errors import ConfigError, SteelyardError

INTERRUPTED = 130
NUM_LOOKS = 500  # at the workers, over the time in which requests arrive
SHORTEST_LOOK_S = 0.05
FRAME_BYTES = 2**27  # of modelled KV: few frames simulate fast, and share a link evenly enough

OnProgress = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """The command line, beside the configuration read from `config_path`."""

    config_path: Path
    trace: str
    seed: int
    service_times: str
    one_host: bool
    speedup: float
    max_requests: int | None
    targets: Targets
    report_path: Path
    json_path: Path | None
    log_path: Path | None

    @property
    def command(self) -> str:
        """What gives the same result again."""
        words = ["steelyard", "simulate", str(self.config_path), "--trace", self.trace, "--seed", str(self.seed)]
        words += ["--service-times", self.service_times]
        words += ["--one-host"] if self.one_host else []
        ttft_s, tpot_s = self.targets.ttft_s, self.targets.tpot_s
        for flag, value in (
            ("--speedup", self.speedup if self.speedup != 1 else None),
            ("--requests", self.max_requests),
            ("--slo-ttft-ms", ttft_s and ttft_s * 1e3),
            ("--slo-tpot-ms", tpot_s and tpot_s * 1e3),
        ):
            words += [] if value is None else [flag, f"{value:.12g}"]
        return shlex.join(words)


def run_simulation(config: ClusterConfig, options: SimulateOptions, console: Console) -> int:
    """Returns the exit code. Raises ConfigError for what cannot be simulated, before it begins."""
    for flag, path in (("--output", options.report_path), ("--json", options.json_path), ("--log", options.log_path)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{flag}: a file cannot be made at {path}")
    spec = _spec(config, options)
    workload = load_workload(options.trace, options.seed, speedup=options.speedup, max_requests=options.max_requests)
    kept = options.log_path is not None
    log = EventLog(keep=kept, detailed=kept)
    try:
        result = _play(spec, workload, log, console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing is written")
        return INTERRUPTED
    summary = summarise(result, options.targets)
    _print_summary(console, summary, result)
    _write(options, spec, workload, result, summary, log)
    console.print(Text(f"report  {options.report_path}"), soft_wrap=True)
    return 0


def _spec(config: ClusterConfig, options: SimulateOptions) -> WorldSpec:
    """A request may be as long as the blocks of a worker, unless the configuration says less."""
    capacity = config.engine.num_blocks * config.engine.block_size
    spec = WorldSpec(
        options.seed,
        config,
        max_context=capacity,
        plain=True,
        frame_bytes=FRAME_BYTES,
        is_controlled=config.is_controlled,
    )
    if Path(options.service_times).suffix in (".yaml", ".yml"):
        return profiled_world(spec, read_profile(Path(options.service_times)), options.one_host)
    if options.one_host:
        raise ConfigError("--one-host: what workers do to each other is only known from a profile, by --service-times")
    return replace(spec, steps=load_service_times(options.service_times))


# --- while it runs --------------------------------------------------------------------------------------------


def _play(spec: WorldSpec, workload: Workload, log: EventLog, console: Console) -> SimulationResult:
    """Raises KeyboardInterrupt."""
    look_s = max(SHORTEST_LOOK_S, workload.span_s / NUM_LOOKS)
    with deferred_interrupt() as check, _progress(console, len(workload.arrivals)) as show, _without_warnings():
        console.print(Text(f"{workload.name}: {_arrivals_of(workload)}"), soft_wrap=True)

        def on_progress(num_ended: int, now_s: float) -> None:
            check()
            show(num_ended, now_s)

        return simulate(spec, workload, log, look_s, on_progress)


@contextmanager
def _progress(console: Console, num_requests: int) -> Iterator[OnProgress]:
    """A bar on a terminal; elsewhere a line for every tenth of the requests."""
    if not console.is_terminal:
        yield _lines(console, num_requests)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("requests · {task.description} ·"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(_clock(0.0), total=num_requests)
        yield lambda num_ended, now_s: progress.update(task, completed=num_ended, description=_clock(now_s))


def _lines(console: Console, num_requests: int) -> OnProgress:
    told = 0

    def on_progress(num_ended: int, now_s: float) -> None:
        nonlocal told
        if (tenth := 10 * num_ended // num_requests) > told:
            told = tenth
            console.print(Text(f"{num_ended} of {num_requests} requests · {_clock(now_s)}"), soft_wrap=True)

    return on_progress


def _clock(now_s: float) -> str:
    minutes, seconds = divmod(int(now_s), 60)
    return f"virtual time {minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The parts that are simulated warn of workers that come and go, at times that are not those of the log."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# --- when it is done ------------------------------------------------------------------------------------------


def _print_summary(console: Console, summary: Summary, result: SimulationResult) -> None:
    if summary.extrapolated_share:
        words = (
            f"{in_percent(summary.extrapolated_share)} of the steps are beyond what the service times were measured for"
        )
        console.print(Text.assemble(("extrapolated: ", "bold red"), words), soft_wrap=True)
    table = Table("ms", *("P50", "P90", "P99", "target", "kept"), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for one in summary.latencies:
        times = (in_ms(one.p50_s), in_ms(one.p90_s), in_ms(one.p99_s), in_ms(one.target_s))
        table.add_row(one.name, *times, in_percent(one.attained))
    console.print(table)
    for name, words in _lines_of(summary, result):
        console.print(Text(f"{name:<11} {words}"), soft_wrap=True)


def _lines_of(summary: Summary, result: SimulationResult) -> Iterator[tuple[str, str]]:
    if summary.attained is not None:
        yield "all targets", f"kept by {in_percent(summary.attained)} of the requests"
    yield (
        "requests",
        f"{summary.num_finished} of {summary.num_requests} answered whole in {summary.span_s:.1f} s of virtual time",
    )
    for error in summary.errors:
        yield "error", f"{error.count} {error.code}"
    yield (
        "throughput",
        (
            f"{summary.requests_per_s:.3g} requests/s, {summary.output_tokens_per_s:.0f} output tokens/s, "
            f"{summary.prompt_tokens_per_s:.0f} prompt tokens/s ({in_percent(summary.cached_share)} cached)"
        ),
    )
    yield "steps", f"{result.num_steps}, {result.num_extrapolated} extrapolated"
    yield "event log", f"digest {result.digest}"


def _write(
    options: SimulateOptions, spec: WorldSpec, workload: Workload, result: SimulationResult, summary: Summary,
    log: EventLog,
) -> None:  # fmt: skip
    try:
        options.report_path.write_text(page(_about(options, spec, workload), result, summary, options.targets), "utf-8")
        if options.json_path is not None:
            options.json_path.write_text(json.dumps(_figures(options, result, summary), indent=1) + "\n")
        if options.log_path is not None:
            options.log_path.write_bytes(log.to_bytes())
    except OSError as error:
        raise SteelyardError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _about(options: SimulateOptions, spec: WorldSpec, workload: Workload) -> About:
    pools, links = spec.config.pools, spec.links
    speed = f"{links.bytes_per_s / 1e9:g} GB/s, {links.latency_s * 1e3:g} ms"
    facts = (
        ("workload", f"{workload.name}: {_arrivals_of(workload)}"),
        ("seed", str(spec.seed)),
        ("workers", f"{pools.prefill.workers} prefill, {pools.decode.workers} decode"),
        ("longest request", f"{spec.engine_spec().max_context:,} tokens, with its answer"),
        ("service times", f"{options.service_times} ({type(spec.steps).__name__})"),
        ("links", f"{speed}; a token has {spec.kv_token_bytes:,} bytes of KV"),
    )  # fmt: skip
    config = yaml.safe_dump(spec.config.model_dump(mode="json"), sort_keys=False)
    return About(f"Simulation of {workload.name}", options.command, facts, config)


def _arrivals_of(workload: Workload) -> str:
    return f"{len(workload.arrivals):,} requests arrive in {workload.span_s:,.1f} s"


def _figures(options: SimulateOptions, result: SimulationResult, summary: Summary) -> dict[str, object]:
    return {
        "command": options.command,
        "digest": result.digest,
        "summary": asdict(summary),
        "requests": [asdict(request) for request in result.requests],
    }
