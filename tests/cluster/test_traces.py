"""Traces as they are published, and what is said of those that are broken."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.simulator.workloads.load import load_workload
from cluster.simulator.workloads.prompts import prompt_of
from cluster.simulator.workloads.traces import read_trace
from cluster.simulator.workloads.workload import Arrival
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TRACES = ROOT / "../shared/data/traces"
AZURE = "azure-conv-2023/AzureLLMInferenceTrace_conv.csv"

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,396,109

2023-11-16 18:15:50.1805900,879,55
"""


def rows(*changes: dict[str, object]) -> str:
    row = {"timestamp": 0, "input_length": 700, "output_length": 5, "hash_ids": [10, 11]}
    return "".join(json.dumps(row | change) + "\n" for change in changes)


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_azures_rows_become_arrivals_from_the_first_on(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, CSV))
    assert trace.arrivals == (Arrival(0.0, 374, 44), Arrival(1.0, 396, 109), Arrival(3.5, 879, 55))
    windows = written(tmp_path, "\ufeff" + CSV.replace("\n", "\r\n"), "windows")
    assert read_trace(windows).arrivals == trace.arrivals


def test_zones_and_other_columns_do_not_matter(tmp_path: Path) -> None:
    text = (
        "GeneratedTokens,TIMESTAMP,Model,ContextTokens\n"
        "5,2024-05-10 00:00:01.5+00:00,x,20\n7,2024-05-10 00:00:01+00:00,y,30\n"
    )
    assert read_trace(written(tmp_path, text)).arrivals == (Arrival(0.0, 30, 7), Arrival(0.5, 20, 5))


def test_mooncakes_blocks_become_pieces_that_prompts_share(tmp_path: Path) -> None:
    text = rows(
        {"timestamp": 1000}, {"timestamp": 1020, "hash_ids": [10, -7]}, {"timestamp": 1500, "hash_ids": [], "kind": "x"}
    )
    trace = read_trace(written(tmp_path, text))
    assert [arrival.at_s for arrival in trace.arrivals] == pytest.approx([0.0, 0.02, 0.5])
    assert [arrival.pieces for arrival in trace.arrivals] == [(0, 1), (0, 2), ()]
    one, two, three = (prompt_of(trace, number, 32000) for number in range(3))
    assert len(one) == len(two) == len(three) == 700
    assert one[:512] == two[:512] != three[:512]
    assert one[512] != two[512]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1: is no trace that is known here"),
        ("# Title\n", "1: is no trace that is known here"),
        ("TIMESTAMP,ContextTokens\n", "1: is no trace that is known here"),
        (CSV.split("\n")[0], " has no requests"),
        (CSV + "2023-11-16 18:15:51,3\n", "6: 2 fields where the first line has 3"),
        (CSV + "2023-11-16 18:15:51,3,4,5\n", "6: 4 fields where the first line has 3"),
        (CSV + "2023-11-16 18:15:51,3,x\n", "6: GeneratedTokens: expected a whole number, got 'x'"),
        (CSV + "2023-11-16 18:15:51,0,4\n", "6: ContextTokens: must be at least 1, got '0'"),
        (CSV + "yesterday,3,4\n", "6: TIMESTAMP: "),
        (rows({}) + "{\n", "2: is not JSON"),
        (rows({}) + "[]\n", "2: expected keys with values, got a list"),
        (rows({}, {"input_length": "700"}), "2: input_length: expected a whole number, got '700'"),
        (rows({}, {"output_length": 0}), "2: output_length: must be at least 1, got 0"),
        (rows({}, {"timestamp": float("nan")}), "2: timestamp: Input should be a finite number"),
        (rows({}, {"timestamp": None}), "2: timestamp: expected a number, got nothing"),
        (rows({}, {"hash_ids": [1]}), "2: hash_ids: 1 blocks of 512 tokens, but input_length 700 needs 2"),
        (rows({}, {"hash_ids": [1, 2, 3]}), "2: hash_ids: 3 blocks of 512 tokens, but input_length 700 needs 2"),
        (rows({}, {"hash_ids": [1, "x"]}), "2: hash_ids.1: expected a whole number, got 'x'"),
        (rows({}) + "\n" + '{"timestamp": 3}\n', "3: input_length: is missing"),
    ],
)
def test_a_broken_row_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert f"{path}:{message}" in caught.value.message


def test_what_is_no_text_is_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"\x80\x81\xff" * 9)
    with pytest.raises(ConfigError, match="trace: is not a trace"):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


# --- the real ones ----------------------------------------------------------------------------------------------


def real(name: str) -> str:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return str(path)


def quantiles(lengths: list[int]) -> list[float]:
    """p50, p90, p99 (between neighbours, evenly) and the most."""
    ordered = sorted(lengths)

    def at(part: float) -> float:
        low, share = divmod(part * (len(ordered) - 1), 1)
        return ordered[int(low)] + share * (ordered[min(int(low) + 1, len(ordered) - 1)] - ordered[int(low)])

    return [at(0.5), at(0.9), at(0.99), ordered[-1]]


@pytest.mark.parametrize(
    ("name", "num_requests", "span_s", "prompts", "outputs"),
    [
        (AZURE, 19366, 3501.7, [1020, 2734, 4142, 14050], [129, 424, 601, 1000]),
        ("mooncake/synthetic_trace.jsonl", 3993, 1022.0, [11587, 38611, 66456, 191378], [69, 389, 768, 893]),
    ],
)  # fmt: skip
def test_a_published_trace_has_the_rows_and_quantiles_it_is_known_for(
    name: str, num_requests: int, span_s: float, prompts: list[int], outputs: list[int]
) -> None:
    trace = load_workload(real(name), 1)
    assert len(trace.arrivals) == num_requests
    assert trace.span_s == pytest.approx(span_s, abs=0.1)
    assert quantiles([arrival.num_prompt for arrival in trace.arrivals]) == pytest.approx(prompts, abs=1)
    assert quantiles([arrival.num_output for arrival in trace.arrivals]) == pytest.approx(outputs, abs=1)


def test_prompts_of_the_synthetic_mooncake_trace_share_64_percent_of_their_blocks() -> None:
    trace = load_workload(real("mooncake/synthetic_trace.jsonl"), 1)
    names = [name for arrival in trace.arrivals for name in arrival.pieces]
    assert 1 - len(set(names)) / len(names) == pytest.approx(0.64, abs=0.005)


def test_times_rounded_to_three_seconds_are_spread() -> None:
    name = real("mooncake/conversation_first_half.jsonl")
    rounded, jittered = load_workload(f"trace:path={name},spread=none", 1), load_workload(name, 1)
    assert len(rounded.arrivals) == len(jittered.arrivals) == 5606
    assert len({arrival.at_s for arrival in rounded.arrivals}) < 600
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(jittered.arrivals)]
    middle = sum(gaps) / len(gaps)
    variation = (sum((gap - middle) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / middle
    assert variation == pytest.approx(1.0, abs=0.1)
