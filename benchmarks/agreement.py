"""Does a load tool that we did not write see what our own ledger says?

    python -m venv G; G/bin/pip install torch==2.13.0; G/bin/pip install guidellm==0.8.1
    python -m benchmarks.agreement --guidellm G/bin/guidellm [--quick] [--json FILE]

Runs guidellm, unmodified, against a live cluster: chat completions, streamed, of synthetic text at a constant rate. Its
means of time to first token, of the time between tokens and of whole requests are compared with those of the gateway's
histograms over the same requests. What the client's own HTTP costs is in its figures and not in ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Row, machine, print_table, print_targets, target, write_json
from benchmarks.serve import WITHOUT_CACHE, Cluster
from benchmarks.slo_peers import export_tokenizer

PROMPT_TOKENS, ANSWER_TOKENS, RATE = 64, 32, 0.6
PATIENT: dict[str, object] = {"canary_s": 120.0}  # the tool's processes starve the cluster while they start
TTFT, ITL, E2E = (
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Means:
    """Seconds, over so many requests."""

    num_requests: int
    ttft_s: float
    itl_s: float
    e2e_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, metavar="PATH", help="the command, in an environment of its own")
    parser.add_argument("--quick", action="store_true", help="8 requests: under a minute")
    parser.add_argument("--json", metavar="FILE", help="write rows and targets there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Cluster(WITHOUT_CACHE, router=PATIENT) as cluster:
        tokenizer = export_tokenizer(Path(folder) / "tokenizer")
        _run_tool(options.guidellm, cluster.url, tokenizer, Path(folder), 2)  # warm
        before = _sums(cluster.url)
        theirs = _run_tool(options.guidellm, cluster.url, tokenizer, Path(folder), 8 if options.quick else 60)
        ours = _means(before, _sums(cluster.url))
    rows = [_row("guidellm", theirs), _row("the gateway's ledger", ours)]
    print_table(f"Means as a client and as the ledger saw them; {machine()}", rows)
    if theirs.num_requests != ours.num_requests:
        raise SystemExit(f"wrong: {theirs.num_requests} requests there, {ours.num_requests} here")
    pairs = (("TTFT", theirs.ttft_s, ours.ttft_s), ("ITL", theirs.itl_s, ours.itl_s), ("E2E", theirs.e2e_s, ours.e2e_s))
    targets = [target("agreement", f"{name}, difference", abs(a / b - 1)) for name, a, b in pairs]
    print_targets(targets)
    write_json(options.json, rows, targets)


def _run_tool(command: str, url: str, tokenizer: Path, folder: Path, num_requests: int) -> Means:
    report = folder / "report.json"
    arguments = [
        "run", "--backend", f"kind=openai_http,target={url}", "--profile", f"kind=constant,rate={RATE}",
        "--constraint", f"kind=max_requests,count={num_requests}", "--tokenizer", f"kind=hf_auto,model={tokenizer}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={ANSWER_TOKENS}",
        "--output", f"kind=json,path={report}", "--disable-console",
    ]  # fmt: skip
    subprocess.run([command, *arguments], check=True)
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]

    if not metrics["request_totals"]["successful"]:
        raise SystemExit("wrong: no request of the tool succeeded")

    def mean(name: str, unit_s: float) -> float:
        return metrics[name]["successful"]["mean"] * unit_s

    return Means(
        metrics["request_totals"]["successful"], mean("time_to_first_token_ms", 1e-3),
        mean("inter_token_latency_ms", 1e-3), mean("request_latency", 1.0),
    )  # fmt: skip


def _sums(url: str) -> dict[str, float]:
    """Every sum and count of the gateway's histograms."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {one.name: one.value for one in samples if one.name.endswith(("_sum", "_count"))}


def _means(before: dict[str, float], after: dict[str, float]) -> Means:
    def since(name: str) -> float:
        return after[name] - before[name]

    def mean(name: str) -> float:
        return since(f"{name}_sum") / since(f"{name}_count")

    return Means(round(since(f"{E2E}_count")), mean(TTFT), mean(ITL), mean(E2E))


def _row(name: str, means: Means) -> Row:
    return {
        "seen by": name, "requests": means.num_requests, "TTFT ms": f"{1e3 * means.ttft_s:.1f}",
        "ITL ms": f"{1e3 * means.itl_s:.2f}", "request ms": f"{1e3 * means.e2e_s:.1f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
