"""Service times from files: every published format, a live worker's profile, and what is said of wrong files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.simulator.chance import Chance
from cluster.simulator.service_times.dynamo import DynamoTimes
from cluster.simulator.service_times.fit import fit_roofline
from cluster.simulator.service_times.load import load_service_times, tensor_parallel_sizes
from cluster.simulator.service_times.measured import MeasuredTimes
from cluster.simulator.service_times.profile import (
    ProfiledLink,
    ProfiledStep,
    WorkerProfile,
    profiled_steps,
    read_profile,
    write_profile,
)
from cluster.simulator.service_times.roofline import Roofline
from engine.errors import ConfigError
from engine.step_shape import Chunk, StepRecord, StepShape

SHARED = Path("../shared/data/service-times")


def prefill_ms(source: str, length: int, tensor_parallel: int | None = None) -> float:
    return load_service_times(source, tensor_parallel).step_s(StepShape((Chunk(0, length),))) * 1e3


def decode_ms(source: str, batch: int, context: int, tensor_parallel: int | None = None) -> float:
    return load_service_times(source, tensor_parallel).step_s(StepShape((), batch, batch * context)) * 1e3


# --- formats, as small files ------------------------------------------------------------------------------------

CSV = """model,system,tp,phase,batch_size,isl_or_context,latency_ms
a/b,h200,1,prefill,1,128,7
a/b,h200,1,prefill,1,1024,22
a/b,h200,1,decode,1,512,5
a/b,h200,1,decode,64,512,7
a/b,h200,1,decode,64,2048,10
a/b,h200,2,prefill,1,128,4
a/b,h200,2,prefill,1,1024,12
a/b,h200,2,decode,1,512,3
c,h100,1,prefill,1,128,70
c,h100,1,prefill,1,1024,220
c,h100,1,decode,1,512,50
"""
SPLITWISE = """model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel
m,gpu,512,1,128,190,54,2
m,gpu,512,1,128,210,56,2
m,gpu,512,1,128,200,55,2
m,gpu,2048,1,128,800,57,2
m,gpu,512,8,128,1500,60,2
"""
DISTSERVE = {
    "opt": {
        "2": {
            "prefill": [14.0, 0.07, 2e-6], "decoding_smallbs": [13.0, 3e-4, 0.06],
            "decoding_largebs": [10.0, 3e-4, 0.08], "decoding_large_small_bs_threshold": 95,
        }
    }
}  # fmt: skip
MOCKER: Mapping[str, object] = {
    "prefill_isl": [100.0, 200.0], "prefill_ttft_ms": [5.0, 9.0], "decode_active_kv_tokens": [0.0, 1e4],
    "decode_context_length": [1.0, 100.0], "decode_itl": [[6.0, 6.0], [8.0, 7.0]],
}  # fmt: skip


def save(path: Path, arrays: Mapping[str, object]) -> str:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})  # pyright: ignore[reportArgumentType]
    return str(path)


def test_a_table_by_phase_model_and_device(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text(CSV)
    assert prefill_ms(f"{path}:a/b@h200", 1024, 1) == 22
    assert decode_ms(f"{path}:a/b@h200", 64, 2048, 1) == 10
    assert prefill_ms(f"{path}:a/b@h200", 128, 2) == 4
    assert prefill_ms(f"{path}:c@h100", 128) == 70
    assert tensor_parallel_sizes(f"{path}:a/b@h200") == (1, 2)


def test_runs_of_splitwise_are_medians(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(SPLITWISE)
    assert prefill_ms(str(path), 512) == pytest.approx(200)
    assert decode_ms(str(path), 1, 512 + 64) == pytest.approx(55)
    assert decode_ms(str(path), 8, 512 + 64) == pytest.approx(60)


def test_coefficients_of_distserve(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(DISTSERVE))
    assert prefill_ms(str(path), 1000) == pytest.approx(14 + 70 + 2)
    assert decode_ms(f"{path}:opt", 100, 10, 2) == pytest.approx(10 + 0.3 + 8)
    assert tensor_parallel_sizes(str(path)) == (2,)


def test_the_table_of_dynamos_mocker(tmp_path: Path) -> None:
    source = save(tmp_path / "mocker.npz", MOCKER)
    assert prefill_ms(source, 150) == prefill_ms(f"{source}:dynamo", 150) == pytest.approx(7)
    assert decode_ms(source, 100, 100) == decode_ms(f"{source}:dynamo", 100, 100) == pytest.approx(7)
    assert decode_ms(source, 50, 100) == pytest.approx(6.5)
    assert prefill_ms(f"{source}:dynamo", 300) == pytest.approx(13), "its straight line goes on"
    assert isinstance(load_service_times(f"{source}:dynamo"), DynamoTimes)
    assert tensor_parallel_sizes(source) == ()
    assert decode_ms(source, 100, 100, 1) == pytest.approx(7), "one worker is of size 1, if any"


SWEEP_PREFILL = {"prefill_isl": [[100, 200], [200, 100]], "prefill_ttft": [[5.0, 9.0], [6.0, 4.0]], "tp": [[8], [4]]}
SWEEP_DECODE = {
    "x_kv_usage": [[0.1, 0.5, 0.2], [0.1, 0.5, 0.2]], "y_context_length": [[100, 100, 900], [100, 100, 900]],
    "z_itl": [[20.0, 30.0, 21.0], [2.0, 3.0, 2.1]], "max_kv_tokens": [[10_000], [10_000]], "tp": [[4], [8]],
}  # fmt: skip


def test_a_sweep_of_several_sizes(tmp_path: Path) -> None:
    save(tmp_path / "prefill.npz", SWEEP_PREFILL)
    save(tmp_path / "decode.npz", SWEEP_DECODE)
    source = str(tmp_path)
    assert tensor_parallel_sizes(source) == (4, 8)
    assert (prefill_ms(source, 200, 8), prefill_ms(source, 200, 4)) == (9, 6)
    assert decode_ms(source, 10, 100, 4) == pytest.approx(20)
    assert decode_ms(source, 30, 100, 8) == pytest.approx(2.5)


def test_a_sweep_of_one_engine(tmp_path: Path) -> None:
    save(
        tmp_path / "selected_prefill_interpolation/raw_data.npz",
        {"prefill_isl": [100, 200], "prefill_ttft": [5.0, 9.0]},
    )
    one = {name: rows[0] for name, rows in SWEEP_DECODE.items() if name != "tp"}
    save(tmp_path / "selected_decode_interpolation/raw_data.npz", one)
    assert prefill_ms(str(tmp_path), 150) == pytest.approx(7)
    assert decode_ms(str(tmp_path), 10, 100) == pytest.approx(20)


def test_the_default_is_the_rooflines_round_numbers() -> None:
    assert load_service_times("default") == Roofline()


# --- what is wrong ----------------------------------------------------------------------------------------------


def fault(source: object, tensor_parallel: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_service_times(str(source), tensor_parallel)
    return caught.value.message


def test_a_choice_that_is_not_there_is_told_what_is(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_text(CSV)
    assert fault(path) == f"{path}: has several tables; choose one as {path}:SELECTOR: a/b@h200, c@h100"
    assert "has no 'x'; choose one" in fault(f"{path}:x")
    assert fault(f"{path}:a/b@h200") == f"{path}: a/b@h200 has tensor-parallel sizes 1, 2; got no size"
    assert fault(f"{path}:a/b@h200", 4).endswith("sizes 1, 2; got 4")
    assert "there is no such file" in fault(tmp_path / "none.csv:a")
    source = save(tmp_path / "mocker.npz", MOCKER)
    assert "dynamo" in fault(f"{source}:vllm")
    assert "one worker as it was measured" in fault(source, 2)
    (tmp_path / "x.txt").write_text("")
    assert "are read from" in fault(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected the columns"),
        (CSV.replace(",7\n", ",\n", 1), "line 2: could not convert"),
        (CSV.replace(",7\n", ",-7\n", 1), "line 2: latency_ms: expected milliseconds above 0"),
        (CSV.replace(",7\n", ",nan\n", 1), "line 2: latency_ms"),
        (CSV.replace("prefill", "both", 1), "line 2: phase: expected prefill or decode, got 'both'"),
        (CSV.replace("1,128,7", "0,128,7", 1), "line 2: expected at least one sequence"),
        (CSV.replace("a/b,h200,1,prefill,1,1024,22\n", ""), "a/b@h200: expected prefill times of at least two lengths"),
        (CSV.replace("a/b,h200,1,decode", "a/b,h200,3,decode"), "a/b@h200: expected decode times, got none"),
        (CSV.replace("a/b,h200,1,prefill,1,128,7", "a/b,h200"), "line 2"),
        ("\xff".encode("latin-1"), "cannot be read"),
    ],
    ids=str,
)
def test_a_wrong_csv_is_told_by_its_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    message = fault(f"{path}:a/b@h200", 1)
    assert message.startswith(f"{path}: ")
    assert said in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prefill_isl": [200.0, 100.0]}, "prefill_isl: expected at least two rising values"),
        ({"prefill_isl": [[100.0, 200.0]]}, "prefill_isl: expected one dimension"),
        ({"prefill_ttft_ms": [1.0]}, "prefill_ttft_ms: expected a value for each"),
        ({"prefill_ttft_ms": [-1.0, 1.0]}, "prefill_ttft_ms: expected durations above 0"),
        ({"prefill_ttft_ms": [1.0, float("nan")]}, "prefill_ttft_ms: expected finite numbers"),
        ({"decode_itl": [6.0, 6.0]}, "decode_itl: expected the shape (2, 2)"),
        ({"decode_itl": [["a", "b"], ["c", "d"]]}, "decode_itl: expected numbers"),
        ({"decode_context_length": [0.0, 1.0]}, "decode_context_length: expected contexts above 0"),
        ({"decode_itl": np.array([[{}, 1], [2, 3]], dtype=object)}, "cannot be read: Object arrays"),
    ],
    ids=str,
)
def test_a_wrong_array_is_named(change: dict[str, object], said: str, tmp_path: Path) -> None:
    source = save(tmp_path / "mocker.npz", {**MOCKER, **change})
    assert fault(source).startswith(f"{source}: {said}")


def test_other_files_than_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mocker.npz"
    for content in (b"", b"PK\x03\x04 not a zip", b"hello", b"\x80\x04K\x01."):
        path.write_bytes(content)
        assert "cannot be read" in fault(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert "expected several arrays by name" in fault(path)
    save(path, {"prefill_isl": [1.0]})
    assert "has no 'prefill_ttft_ms'; it has prefill_isl" in fault(path)


def test_a_wrong_sweep_is_told(tmp_path: Path) -> None:
    assert "expected prefill.npz and decode.npz" in fault(tmp_path)
    save(tmp_path / "prefill.npz", SWEEP_PREFILL)
    for change, said in (
        ({"tp": [[4], [2]]}, "tp: expected as in"),
        ({"tp": [[4], [4]]}, "tp: expected every size once"),
        ({"z_itl": [[1.0, 2.0, 3.0]]}, "z_itl: expected a row for each of 2 sizes"),
        ({"z_itl": [[1.0], [2.0]]}, "z_itl: expected as many values as x_kv_usage"),
    ):
        save(tmp_path / "decode.npz", SWEEP_DECODE | change)
        assert said in fault(tmp_path, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is not JSON"),
        ("[]", "top level"),
        (json.dumps({"opt": {"x": DISTSERVE["opt"]["2"]}}), "opt.x"),
        (json.dumps({"opt": {"2": DISTSERVE["opt"]["2"] | {"prefill": [1, 2]}}}), "opt.2.prefill.2: Field required"),
        (json.dumps({"opt": {"2": DISTSERVE["opt"]["2"] | {"prefil": [1]}}}), "opt.2.prefil: Extra inputs"),
        (json.dumps({"opt": {"2": DISTSERVE["opt"]["2"] | {"prefill": [-1, 2, 3]}}}), "opt.2.prefill.0"),
    ],
    ids=str,
)
def test_a_wrong_json_is_told_by_its_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text(text)
    assert said in fault(path)


# --- profiles ---------------------------------------------------------------------------------------------------

PROFILE = WorkerProfile(
    model="m", device="two cores", gateway_ms=1.5, token_ms=0.1, link=ProfiledLink(latency_ms=0.2, gb_per_s=1.5),
    steps=[
        ProfiledStep(chunks=[[0, 128]], step_ms=20.0, count=3), ProfiledStep(chunks=[[0, 256]], step_ms=36.0),
        ProfiledStep(num_decoding=2, num_context=300, step_ms=5.0),
        ProfiledStep(chunks=[[128, 64]], num_decoding=2, num_context=300, step_ms=14.0),
    ],
)  # fmt: skip


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    write_profile(PROFILE, path)
    assert read_profile(path) == PROFILE
    times = load_service_times(str(path))
    assert times.step_s(PROFILE.steps[2].shape) == pytest.approx(5e-3)
    assert "a profile has no selector" in fault(f"{path}:x")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("version: 1", "version: 2", "version: expected 1, got 2"),
        ("model: m", "modle: m", "modle: unknown key; did you mean 'model'?"),
        ("model: m", "modle: m", "model: is missing"),
        ("gateway_ms: 1.5", "gateway_ms: -1", "gateway_ms: must be at least 0, got -1"),
        ("gateway_ms: 1.5", "gateway_ms: .nan", "line 4: .nan is not a finite number"),
        ("gateway_ms: 1.5", "gateway_ms: soon", "gateway_ms: expected a number, got 'soon'"),
        ("gb_per_s: 1.5", "gb_per_s: 0", "link.gb_per_s: must be more than 0"),
        ("step_ms: 5.0", "step_ms: 0", "steps.2.step_ms: must be more than 0"),
        ("step_ms: 5.0", "step_s: 5.0", "steps.2.step_s: unknown key; did you mean 'step_ms'?"),
        ("[0, 128]", "[0, 0]", "steps.0: a chunk has at least"),
        ("[0, 128]", "[0, 1.5]", "steps.0.chunks.0.1: expected a whole number, got 1.5"),
        ("[0, 128]", "[128]", "steps.0.chunks.0: List should have at least 2 items"),
        ("num_decoding: 2", "num_decoding: 0", "steps.2: a step computes something"),
        ("num_context: 300", "num_context: 1", "steps.2: each decoding sequence reads"),
        ("steps:", "steps: []\nother:", "steps: List should have at least 1 item"),
        ("model: m", "model: [", "line"),
    ],
    ids=str,
)
def test_a_wrong_profile_is_told_by_its_key(old: str, new: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "worker.yaml"
    write_profile(PROFILE, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    message = fault(path)
    assert message.startswith(f"{path}: ")
    assert said in message


def test_steps_of_about_one_shape_are_one_line_of_a_profile() -> None:
    decode = [StepRecord(StepShape((), 4, 1040 + 4 * step), 0.01 + 0.0001 * step) for step in range(9)]
    chunk = [StepRecord(StepShape((Chunk(0, 64),)), 0.03)]
    steps = profiled_steps([*decode, *chunk])
    assert [(step.num_decoding, step.num_context, step.count) for step in steps] == [(4, 1056, 9), (0, 0, 1)]
    assert steps[0].step_ms == pytest.approx(10.4)


# --- predictions between measured steps -------------------------------------------------------------------------

KNOWN = Roofline(4e-3, 8e-3, 4e-7, 3e-4, 1.2e-3, 2e-8)  # of the order of a small model on a few cores
LIVE = (
    [StepShape((), batch, batch * context) for batch in (1, 2, 4, 8, 16, 32) for context in (40, 100, 250, 600, 1500)]
    + [StepShape((Chunk(before, new),)) for before in (0, 256, 1024) for new in (1, 16, 32, 64, 128, 256)]
    + [StepShape((Chunk(0, new),), batch, 200 * batch) for batch in (1, 4, 16) for new in (32, 128, 256)]
)
UNSEEN = (
    [StepShape((), batch, batch * context) for batch in (1, 3, 6, 11, 29) for context in (60, 170, 420, 1300)]
    + [StepShape((Chunk(before, new),)) for before in (0, 128, 700) for new in (9, 50, 99, 200)]
    + [StepShape((Chunk(100, new),), batch, 350 * batch) for batch in (2, 9, 14) for new in (40, 77, 222)]
    + [StepShape((Chunk(0, 60), Chunk(0, 120)))]
)


def measured(seed: int, noise: float) -> list[StepRecord]:
    """Seven steps of each shape; one in twenty is up to five times slower than it should be."""
    chance, records = Chance(seed, "noise"), list[StepRecord]()
    for shape in LIVE:
        for _ in range(7):
            slow = 1 + 4 * chance.unit() if chance.below(20) == 0 else 1.0
            records.append(StepRecord(shape, KNOWN.step_s(shape) * slow * (1 + noise * (2 * chance.unit() - 1))))
    return records


@pytest.mark.parametrize("seed", range(4))
def test_steps_between_measured_ones_are_predicted_within_five_per_cent(seed: int) -> None:
    records = measured(seed, 0.05)
    steps = profiled_steps(records)
    fitted = fit_roofline(records)
    assert fitted.median_error < 0.04
    assert fitted.p90_error < 0.1
    for times in (fitted.times, MeasuredTimes(records), MeasuredTimes([step.record for step in steps])):
        errors = [abs(times.step_s(shape) / KNOWN.step_s(shape) - 1) for shape in UNSEEN]
        assert max(errors) < 0.05, UNSEEN[errors.index(max(errors))]


def test_what_no_roofline_fits_is_taken_from_the_measurements() -> None:
    """Batches of 5 to 8 are padded to 8 on this device: the roofline does not know."""

    def padded_s(shape: StepShape) -> float:
        return KNOWN.step_s(replace(shape, num_decoding=8) if 5 <= shape.num_decoding <= 8 else shape) * (
            1.3 if 5 <= shape.num_decoding <= 8 else 1.0
        )

    shapes = [StepShape((), batch, batch * context) for batch in range(1, 17) for context in (50, 200, 800)]
    chunks = [StepShape((Chunk(0, new),)) for new in (32, 64, 128, 256)]
    times = MeasuredTimes([StepRecord(shape, padded_s(shape)) for shape in [*shapes, *chunks]])
    for batch in (4, 5, 8, 9):
        shape = StepShape((), batch, batch * 400)
        assert times.step_s(shape) == pytest.approx(padded_s(shape), rel=0.02)
    assert times.fitted.p90_error > 0.05


def test_what_was_not_measured_of_a_worker_is_said() -> None:
    times = MeasuredTimes(measured(0, 0.0))
    inside = [*UNSEEN, *LIVE]
    outside = [
        StepShape((), 33, 33 * 100), StepShape((), 8, 8 * 1600), StepShape((), 8, 8 * 30), StepShape((Chunk(0, 300),)),
        StepShape((Chunk(2000, 16),)), StepShape((Chunk(0, 32),), 40, 4000),
    ]  # fmt: skip
    assert not any(map(times.extrapolates, inside))
    assert all(map(times.extrapolates, outside))
    only_chunks = MeasuredTimes([StepRecord(StepShape((Chunk(0, 64),)), 0.02)])
    assert only_chunks.extrapolates(StepShape((), 1, 10))
    assert only_chunks.step_s(StepShape((Chunk(0, 64),))) == pytest.approx(0.02)


# --- published files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "tensor_parallel", "length", "batch", "context", "expected_prefill_ms", "expected_decode_ms"),
    [
        ("service_times_vllm.csv:Qwen/Qwen3-8B@h200_sxm", 1, 4096, 64, 2048, 91.186, 10.188),
        ("h200-llama-3.1-8b-fp8", None, 4168, 1, 350, 87.342, 4.38),
        ("h200-llama-3.1-8b-fp8/mocker_perf_data.npz", None, 100, 10, 1000, 0.60659567, 6.5695),
        ("h200-llama-3.1-8b-fp8/mocker_perf_data.npz:dynamo", None, 100, 10, 1000, 0.60659567, 6.5695),
        ("pre_swept/h100_sxm/vllm/nvidia/Llama-3.3-70B-Instruct-FP8", 8, 2135, 1, 350, 95.201, 9.46),
        ("splitwise_a100_h100.csv:llama2-70b@a100-80gb", 2, 512, 1, 576, 196.3, 54.9),
        ("profiler-a100-80g.distserve.json:facebook/opt-13b", 1, 1000, 10, 100, 127.137, 20.94),
    ],
    ids=str,
)  # fmt: skip
def test_a_published_file_says_what_it_says(
    source: str, tensor_parallel: int | None, length: int, batch: int, context: int, expected_prefill_ms: float,
    expected_decode_ms: float,
) -> None:  # fmt: skip
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    found = f"{SHARED}/{source}"
    assert prefill_ms(found, length, tensor_parallel) == pytest.approx(expected_prefill_ms, rel=0.01)
    assert decode_ms(found, batch, context, tensor_parallel) == pytest.approx(expected_decode_ms, rel=0.02)


def test_the_published_mocker_table_is_read_as_numpy_would() -> None:
    path = SHARED / "h200-llama-3.1-8b-fp8/mocker_perf_data.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path) as table:
        active, contexts, itl = (
            table[name] for name in ("decode_active_kv_tokens", "decode_context_length", "decode_itl")
        )
        for times in (load_service_times(str(path)), load_service_times(f"{path}:dynamo")):
            for length in (101, 777, 5000, 16_000):
                expected = np.interp(length, table["prefill_isl"], table["prefill_ttft_ms"])
                assert times.step_s(StepShape((Chunk(0, length),))) * 1e3 == pytest.approx(expected)
            for batch, mean in ((3, 500), (60, 2200), (200, 4000), (64, 13_000)):
                by_context = [np.interp(batch * mean, active, column) for column in itl.T]
                step_ms = times.step_s(StepShape((), batch, batch * mean)) * 1e3
                assert step_ms == pytest.approx(np.interp(mean, contexts, by_context))
