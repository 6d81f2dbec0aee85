"""The command line, `steelyard`. Each command is a function below; exit codes:

0 done · 1 it failed · 2 the command or the YAML is wrong · 130 interrupted before it was done, or the cluster ready

Everything heavy (Ray, torch, the HTTP client) is imported by the command that needs it, so that --help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from engine.errors import ConfigError, SteelyardError

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from engine.models.catalogue import CatalogueModel
    from router.api import HealthView

FAILED = 1
WRONG_INPUT = 2
INTERRUPTED = 130
TABLE_WIDTH = 110  # a row of `status`; on a narrower terminal it wraps, and loses nothing
DEFAULT_URL = "http://127.0.0.1:8000"

app = typer.Typer(name="steelyard", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
models_app = typer.Typer(no_args_is_help=True)
config_app = typer.Typer(no_args_is_help=True)
app.add_typer(models_app, name="models", help="Get models, and see which there are.")
keys_app = typer.Typer(no_args_is_help=True)
app.add_typer(keys_app, name="keys", help="Make and check API keys.")
app.add_typer(config_app, name="config", help="Look at configuration files.")

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file, such as configs/local.yaml")]
UrlOption = Annotated[str, typer.Option("--url", help="where the gateway listens")]


def main() -> None:
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"steelyard {version('steelyard')}")
        except PackageNotFoundError:  # in a Ray job the working directory is on the path, not installed
            typer.echo("steelyard (not installed)")
        raise typer.Exit()


@app.callback()
def steelyard(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Serve language models through separate prefill and decode workers."""


# --- keys -----------------------------------------------------------------------------------------------------


@keys_app.command("new")
def keys_new(tenant: Annotated[str, typer.Argument(help="whose it is to be")]) -> None:
    """Make an API key. It is shown once; the file holds only its hash."""
    from cluster.keys import new_key
    from router.tenants import hash_of

    key = new_key()
    _say(f"key of {tenant}, shown only now: {key}")
    _say(f'line for its keys in router.keys_file: - "{hash_of(key)}"')


@keys_app.command("check")
def keys_check(file: Annotated[Path, typer.Argument(help="a keys file")]) -> None:
    """Check a keys file, as the gateway would."""
    with _told_plainly():
        from cluster.keys import KeySource

        source = KeySource(str(file), None)
        source.reload()
        ring = source.ring()
        assert ring is not None, "a file was read"
        for tenant in ring.tenants:
            _say(f"{tenant.name}: {len(tenant.keys)} keys, {'enabled' if tenant.enabled else 'disabled'}")


# --- a cluster ------------------------------------------------------------------------------------------------


@app.command()
def serve(
    config: ConfigArgument,
    host: Annotated[str | None, typer.Option(help="instead of router.host")] = None,
    port: Annotated[int | None, typer.Option(help="instead of router.port; 0: the system chooses")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="show what Ray and the workers log")] = False,
) -> None:
    """Start a cluster and hold it until Ctrl-C."""
    with _told_plainly():
        loaded = _load(config, {"router.host": host, "router.port": port})
        from cluster.launch import serve as serve_cluster

        code = serve_cluster(loaded, _console(), verbose=verbose)
    raise typer.Exit(code)


@app.command()
def stop(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="the file it was started with; else its defaults")
    ] = None,
) -> None:
    """Stop a cluster that another command or job started on the same Ray."""
    with _told_plainly():
        from cluster.config import ClusterConfig
        from cluster.launch import stop as stop_cluster

        loaded = _load(config) if config else ClusterConfig()
        if not stop_cluster(loaded):
            raise SteelyardError(f"no cluster named {loaded.cluster.name!r} runs on this Ray")
        _say(f"{loaded.cluster.name} is stopped")


@app.command()
def status(url: UrlOption = DEFAULT_URL) -> None:
    """Show pools, workers and their load; exit code 1 if the cluster is not well."""
    with _told_plainly():
        from cluster.client import ApiClient
        from cluster.keys import key_of_environment

        with ApiClient(url, key=key_of_environment()) as client:
            health = client.health()
    _print_health(health)
    raise typer.Exit(0 if health.healthy else FAILED)


@app.command()
def chat(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="one question; else a conversation")] = None,
    url: UrlOption = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="the served one, if not given")] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time")] = 0.3,
    seed: Annotated[int | None, typer.Option(help="for an answer that can be repeated")] = None,
) -> None:
    """Talk to the model."""
    with _told_plainly():
        from cluster.chat import Conversation
        from cluster.client import ApiClient, ChatOptions
        from cluster.keys import key_of_environment

        with ApiClient(url, key=key_of_environment()) as client:
            options = ChatOptions(model or client.model(), max_tokens, temperature, seed)
            conversation = Conversation(client, options, _console(), system)
            conversation.ask(text) if text else conversation.run()


@app.command()
def report(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="a ledger file, or the URL of a gateway")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say where requests spent their time: waiting and service of prefill and decode, and what a faster stage gives."""
    with _told_plainly():
        from cluster.report_command import run_report

        run_report(source, _console(), as_json=as_json)


@app.command()
def explain(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a journal: controller.journal_file")],
    flips_only: Annotated[bool, typer.Option("--flips", help="only decisions to flip a worker")] = False,
) -> None:
    """Say what the controller decided and why, and make each decision again; exit code 1 if one comes out otherwise."""
    with _told_plainly():
        from cluster.explain import run_explain

        agrees = run_explain(file, _console(), flips_only=flips_only)
    raise typer.Exit(0 if agrees else FAILED)


@app.command()
def profile(
    url: UrlOption = DEFAULT_URL,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="what to write")] = Path(
        "profile.yaml"
    ),
    device: Annotated[str | None, typer.Option(help="what to call it that the workers run on")] = None,
) -> None:
    """Measure how fast a cluster of one prefill and one decode worker is, for the simulator; under two minutes."""
    with _told_plainly():
        from cluster.profiling.command import profile as profile_cluster

        try:
            profile_cluster(url, output, device, _console())
        except KeyboardInterrupt:
            _say("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from None


# --- a simulated one ------------------------------------------------------------------------------------------


@app.command()
def simulate(
    config: ConfigArgument,
    trace: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="the workload: a trace (Azure's CSV, Mooncake's JSON lines), a YAML file as in configs/workloads, "
            "or a short text such as poisson:rate=4,prompt=1024,output=128,seconds=300",
        ),
    ],
    seed: Annotated[int, typer.Option(help="of all that is random; the same seed gives the same log")] = 0,
    service_times: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="how long steps take: a table (Dynamo's .npz, .csv, DistServe's .json; FILE:SELECTOR for one of "
            "several) or what `steelyard profile` wrote; default: a large GPU, roughly",
        ),
    ] = "default",
    one_host: Annotated[
        bool, typer.Option("--one-host", help="with a profile: all workers share one machine, as those it measured did")
    ] = False,
    speedup: Annotated[float, typer.Option(help="so many times as many requests per second")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="only the first so many")] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(min=0, help="target: time to the first token")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(min=0, help="target: mean time per token after it")] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="the report, one HTML file")] = Path("report.html"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="figures and requests, for programs")
    ] = None,
    log_file: Annotated[Path | None, typer.Option("--log", metavar="FILE", help="the event log")] = None,
) -> None:
    """Play a workload on a simulated cluster, in virtual time, and report how requests fare.

    Routing, queues, schedulers and block managers are the real ones; only the time of steps and links is modelled.
    """
    with _told_plainly():
        loaded = _load(config)
        from cluster.simulate import SimulateOptions, run_simulation
        from cluster.simulator.report.summary import Targets

        targets = Targets(slo_ttft_ms and slo_ttft_ms / 1e3, slo_tpot_ms and slo_tpot_ms / 1e3)
        options = SimulateOptions(
            config, trace, seed, service_times, one_host, speedup, requests, targets, output, json_file, log_file
        )
        code = run_simulation(loaded, options, _console())
    raise typer.Exit(code)


# --- plans ----------------------------------------------------------------------------------------------------


@app.command()
def plan(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="the workload, as for `steelyard simulate --trace`")],
    slo: Annotated[str, typer.Option(metavar="TARGETS", help="such as ttft=500ms,tpot:p99=80ms; P90 if not said")],
    gpus: Annotated[int, typer.Option(min=2, help="how many there are")],
    service_times: Annotated[str, typer.Option(metavar="SOURCE", help="how long steps take, by tensor-parallel size")],
    rate: Annotated[float | None, typer.Option(min=0.001, help="requests/s to serve, instead of the trace's")] = None,
    tensor_parallel: Annotated[
        str, typer.Option(metavar="SIZES", help="to choose from, as 1,2,4; else all that the service times know")
    ] = "",
    affinity: Annotated[
        Literal["high", "low"],
        typer.Option(help="high: KV may cross nodes (Algorithm 1 of DistServe); low: it may not (Algorithm 2)"),
    ] = "high",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="a worker's GPUs are in one node")] = 8,
    gpu_memory_gb: Annotated[float, typer.Option(min=1)] = 80.0,
    weights_gb: Annotated[float, typer.Option(min=0, help="of the model")] = 16.0,
    kv_token_bytes: Annotated[int, typer.Option(min=1, help="KV of one token")] = 2**17,
    link_gb_per_s: Annotated[float, typer.Option(min=0.001, help="of a worker, between nodes")] = 25.0,
    node_link_gb_per_s: Annotated[float, typer.Option(min=0.001, help="of a worker, inside of its node")] = 300.0,
    requests: Annotated[int, typer.Option(min=2, help="of the trace, in each simulation")] = 300,
    config: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="for the engine's limits; else those of a large GPU")
    ] = None,
    seed: Annotated[int, typer.Option(help="of all that is random")] = 0,
    output: Annotated[Path, typer.Option(metavar="FILE", help="the report, one HTML file")] = Path("plan.html"),
) -> None:
    """Say how many GPUs, at which tensor-parallel sizes and in which ratio, serve a workload within its targets.

    Simulates many clusters; exit code 1 if none of them keeps the targets.
    """
    with _told_plainly():
        loaded = _load(config) if config else None
        from cluster.plan import PlanOptions, run_plan
        from cluster.simulator.planning.search import Affinity

        options = PlanOptions(
            trace, slo, gpus, service_times, rate, tensor_parallel, Affinity(affinity), gpus_per_node, gpu_memory_gb,
            weights_gb, kv_token_bytes, link_gb_per_s, node_link_gb_per_s, requests, seed, output,
        )  # fmt: skip
        code = run_plan(loaded, options, _console())
    raise typer.Exit(code)


# --- models ---------------------------------------------------------------------------------------------------


@models_app.command("pull")
def pull_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a name from `models list`, or a hub name org/name")],
    cache_dir: Annotated[Path | None, typer.Option(help="instead of ~/.cache/steelyard/models")] = None,
) -> None:
    """Get a model's files and check them."""
    with _told_plainly():
        from cluster.pull_progress import pull_progress
        from engine.models.catalogue import CATALOGUE
        from engine.models.store import resolve

        with pull_progress(_console()) as report:
            files = resolve(name, cache_dir, report)
        _say(f"{files.name}: {files.path}")
        if name in CATALOGUE:
            _say(_terms(CATALOGUE[name]))


@models_app.command("list")
def list_models() -> None:
    """Show the models that can be had by name."""
    from rich.table import Table

    from engine.models.catalogue import CATALOGUE

    table = Table("name", "licence", "download", "on disk", box=None, pad_edge=False)
    for name, model in CATALOGUE.items():
        table.add_row(name, model.licence, _mebibytes(model.download_bytes), _mebibytes(model.size_bytes))
    _console().print(table)
    for name, model in CATALOGUE.items():
        if model.notes:
            _say(f"{name}: {_terms(model)}")


# --- configuration --------------------------------------------------------------------------------------------


@config_app.command("check")
def check_config(file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Say whether a YAML file is right, and what it asks for."""
    with _told_plainly():
        loaded = _load(file)
        pools = loaded.pools
        _say(f"{file} is right")
        _say(f"  model    {loaded.model.name} in {loaded.model.dtype} on {loaded.engine.device}")
        for name, pool in (("prefill", pools.prefill), ("decode", pools.decode)):
            gpus = f", {pool.num_gpus:g} GPU" if pool.num_gpus else ""
            _say(f"  {name:<8} {pool.workers} x {pool.tensor_parallel} rank, {pool.num_cpus:g} CPU{gpus} each")
        _say(f"  gateway  http://{loaded.router.host}:{loaded.router.port}")


# --- small things ---------------------------------------------------------------------------------------------


def _load(path: Path, overrides: dict[str, object] | None = None) -> ClusterConfig:
    from cluster.config import load_config

    return load_config(path, {key: value for key, value in (overrides or {}).items() if value is not None})


@contextmanager
def _told_plainly() -> Iterator[None]:
    """Our own errors become one message on stderr and an exit code, without a traceback."""
    try:
        yield
    except SteelyardError as error:
        console = Console(stderr=True)
        console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
        raise typer.Exit(WRONG_INPUT if isinstance(error, ConfigError) else FAILED) from None


def _print_health(health: HealthView) -> None:
    from rich.table import Table

    console = Console(file=sys.stdout, width=max(TABLE_WIDTH, _console().width))
    age = "never" if health.canary_age_s is None else f"{health.canary_age_s:.1f} s ago"
    name = f"{health.gateway_id}: " if health.gateway_id else ""
    word = Text.assemble(name, ("healthy", "bold green"))
    if not health.healthy:
        word = Text.assemble(name, ("unhealthy: ", "bold red"), health.reason)
    counts = f" · last canary {age} · membership {health.membership_version} · {health.num_live_requests} live requests"
    console.print(word.append(counts, "default"), soft_wrap=True)
    columns = ("pool", "worker", "incarnation", "address", "", "running", "waiting", "blocks used")
    table = Table(*columns, box=None, pad_edge=False)
    for worker in sorted(health.workers, key=lambda worker: (worker.role != "prefill", worker.worker_id)):
        used = f"{worker.num_blocks - worker.num_free_blocks} of {worker.num_blocks}"
        leaked = f", {worker.num_leaked_blocks} leaked" if worker.num_leaked_blocks else ""
        link = "up" if worker.connected else Text("down", "red")
        row = (worker.role, worker.worker_id, worker.incarnation[:8], worker.address, link)
        table.add_row(*row, str(worker.num_running), str(worker.num_waiting), used + leaked)
    console.print(table, soft_wrap=True)
    if health.control is not None:
        control = health.control
        took = f", the last one in {control.last_flip_s:.2f} s" if control.last_flip_s is not None else ""
        changed = f" · {control.num_added} workers added, {control.num_removed} removed"
        coming = f", {control.num_coming} to come" if control.num_coming else ""
        scaled = changed + coming if control.num_added or control.num_removed or control.num_coming else ""
        console.print(
            f"controller ({control.mode}): {control.num_flips} flips{took}{scaled} · {control.reason}", soft_wrap=True
        )


def _terms(model: CatalogueModel) -> str:
    return f"{model.licence}: {model.notes}" if model.notes else model.licence


def _mebibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"


def _say(text: str) -> None:
    _console().print(text, soft_wrap=True, markup=False, highlight=False)


def _console() -> Console:
    """It holds on to the stdout of now: `serve` sends later prints of others away."""
    return Console(file=sys.stdout)
