"""The report of a simulation, over results made by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.simulator.report.page import About, page
from cluster.simulator.report.series import bin_width_s, bins, pool_looks, thinned
from cluster.simulator.report.summary import ErrorCount, Targets, keeps, quantile, summarise
from cluster.simulator.results import Happening, RequestResult, SimulationResult, WorkerSample


def done(number: int, ttft_s: float, tpot_s: float, num_output: int = 11) -> RequestResult:
    """Arrived at `number` seconds; a prompt of 100 tokens, of which 20 were cached."""
    ended_s = number + ttft_s + tpot_s * (num_output - 1)
    return RequestResult(f"r{number}", float(number), 100, num_output, num_output, 20, ttft_s, tpot_s, ended_s)


def failed(number: int, code: str) -> RequestResult:
    return RequestResult(f"r{number}", float(number), 100, 11, 0, 0, None, None, number + 1.0, code)


REQUESTS = (
    done(0, 0.1, 0.01),
    done(1, 0.3, 0.01),
    done(2, 0.1, 0.05),
    done(3, 0.2, 0.01, num_output=1),
    failed(4, "deadline_exceeded"),
    failed(5, "overloaded"),
    failed(6, "overloaded"),
    replace(done(7, 0.1, 0.01), num_wanted=12),  # a token is missing
)
HAPPENINGS = (Happening(0.0, "prefill-0", "came"), Happening(4.0, "decode-1", "changed to prefill"))
SAMPLES = tuple(
    WorkerSample(float(at), name, "prefill" if name == "prefill-0" or at >= 4 else "decode", at, 2, 100, 60, 10)
    for at in range(8) for name in ("prefill-0", "decode-0", "decode-1")
    if name != "decode-0" or at < 4
)  # fmt: skip
RESULT = SimulationResult(REQUESTS, SAMPLES, HAPPENINGS, 8.0, 200, 50, "d1" * 16)
TARGETS = Targets(0.2, 0.02)


def test_errors_and_answers_that_are_not_whole_keep_no_target() -> None:
    assert [keeps(request, TARGETS) for request in REQUESTS] == [True, False, False, True, False, False, False, False]
    summary = summarise(RESULT, TARGETS)
    assert summary.attained == 2 / 8
    assert summary.ttft.attained == 3 / 8
    assert summary.tpot.attained == 3 / 8
    assert summary.gap.attained is None
    assert summary.errors == (ErrorCount("overloaded", 2), ErrorCount("deadline_exceeded", 1))
    assert (summary.num_requests, summary.num_finished) == (8, 4)


def test_a_time_is_kept_when_it_is_the_targets() -> None:
    assert keeps(done(0, 0.2, 0.0), Targets(ttft_s=0.2))
    assert not keeps(done(0, 0.2 + 1e-9, 0.0), Targets(ttft_s=0.2))


def test_without_targets_there_is_no_attainment() -> None:
    summary = summarise(RESULT, Targets())
    assert summary.attained is summary.ttft.attained is summary.tpot.attained is None
    one = summarise(RESULT, Targets(tpot_s=0.02))
    assert one.attained == one.tpot.attained == 3 / 8
    assert one.ttft.attained is None


def test_quantiles_are_of_the_requests_that_have_the_time() -> None:
    summary = summarise(RESULT, TARGETS)
    assert summary.ttft.p50_s == pytest.approx(0.1)  # of 0.1, 0.3, 0.1, 0.2, 0.1
    assert summary.ttft.p90_s == pytest.approx(0.26)
    assert summary.tpot.p50_s == pytest.approx(0.01)  # of 0.01, 0.01, 0.05, 0.01: a single token has none
    assert summary.tpot.p99_s == pytest.approx(0.01 + 0.97 * 0.04)


def test_rates_are_over_the_span() -> None:
    summary = summarise(RESULT, TARGETS)
    assert summary.requests_per_s == 4 / 8
    assert summary.output_tokens_per_s == (4 * 11 + 1) / 8
    assert summary.prompt_tokens_per_s == 500 / 8
    assert summary.cached_share == 100 / 500
    assert summary.extrapolated_share == 50 / 200


def test_a_run_that_gave_nothing_has_a_summary() -> None:
    summary = summarise(SimulationResult((failed(0, "overloaded"),), (), (), 0.0, 0, 0, "d"), TARGETS)
    assert summary.attained == 0
    assert summary.ttft.p50_s is None
    assert summary.extrapolated_share == summary.cached_share == 0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], part: float) -> None:
    assert quantile(values, part) == pytest.approx(float(np.quantile(values, part)), rel=1e-9, abs=1e-9)


# --- over time --------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e5), max_size=50))
def test_every_request_is_in_the_bin_of_its_arrival(times: list[float]) -> None:
    found = bins([replace(failed(0, "x"), arrived_s=at_s) for at_s in times])
    assert 1 <= len(found) <= 62
    assert sorted(request.arrived_s for one in found for request in one.requests) == sorted(times)
    for one in found:
        assert all(
            one.begin_s <= request.arrived_s < one.begin_s + one.width_s * (1 + 1e-9) for request in one.requests
        )


def test_bins_have_round_widths() -> None:
    assert [bin_width_s(span_s) for span_s in (0.0, 5.0, 61.0, 3600.0, 1e6)] == [0.1, 0.1, 2, 60, 1e6 / 60]


def test_pools_are_added_up_by_the_role_of_the_moment() -> None:
    looks = pool_looks(SAMPLES)
    assert [look.num_workers for look in looks["prefill"]] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [look.num_workers for look in looks["decode"]] == [2, 2, 2, 2, 0, 0, 0, 0]
    assert [look.num_running for look in looks["decode"]] == [0, 2, 4, 6, 0, 0, 0, 0]
    assert looks["decode"][0].used_share == 0.4
    assert looks["decode"][0].held_share == 0.1
    assert looks["decode"][7].used_share == 0


def test_many_looks_are_averaged() -> None:
    samples = [WorkerSample(0.5 * at, "prefill-0", "prefill", at % 2, 0, 10, 10, 0) for at in range(4080)]
    looks = pool_looks(samples)["prefill"]
    assert len(looks) == 240
    assert {look.num_workers for look in looks} == {1}
    assert all(look.num_running == pytest.approx(0.5, abs=0.05) for look in looks)


@given(st.integers(0, 100), st.integers(1, 20))
def test_thinned_is_even_and_bounded(count: int, most: int) -> None:
    left = thinned(range(count), most)
    assert len(left) <= most
    assert list(left) == list(range(0, count, left[1] - left[0] if len(left) > 1 else max(1, count)))


# --- the page ---------------------------------------------------------------------------------------------------

ABOUT = About("Simulation of t", "steelyard simulate c.yaml --trace t", (("seed", "7"),), "pools: {}\n")
PLOTS = [
    "arrivals",
    "pools",
    "running",
    "queues",
    "blocks",
    "ttft",
    "ttft-spread",
    "gap",
    "gap-spread",
    "tpot",
    "tpot-spread",
]


def made(result: SimulationResult = RESULT, targets: Targets = TARGETS, about: About = ABOUT) -> str:
    return page(about, result, summarise(result, targets), targets)


def own(text: str) -> str:
    """A page without plotly's source."""
    return re.sub(r"<script>.{100000,}?</script>", "", text, count=1, flags=re.DOTALL)


def test_a_page_has_all_plots_figures_and_happenings_and_needs_nothing_from_elsewhere() -> None:
    text = made()
    shown = own(text)
    assert len(text) > 10 * len(shown)
    assert sorted(re.findall(r'<div id="([a-z-]+)" class="plotly', shown)) == sorted([*PLOTS, "attainment"])
    assert not re.search(r"(src|href)\s*=|@import|url\(", shown)
    for words in ("25.0 %", "decode-1", "changed to prefill", "2 overloaded", "d1" * 16, "extrapolated", ABOUT.command):
        assert words in shown
    assert made() == text


def test_what_there_is_nothing_of_is_left_out() -> None:
    quiet = SimulationResult(REQUESTS[:4], SAMPLES, HAPPENINGS[:1], 8.0, 200, 0, "d")
    shown = own(made(quiet, Targets()))
    assert sorted(re.findall(r'<div id="([a-z-]+)" class="plotly', shown)) == sorted(PLOTS)
    for words in ("class='warning'", "What changed", "kept all targets"):
        assert words not in shown


@pytest.mark.parametrize("requests", [(), (failed(0, "overloaded"),)])
def test_a_page_of_nothing_is_a_page(requests: tuple[RequestResult, ...]) -> None:
    assert "</html>" in made(SimulationResult(requests, (), (), 0.0, 0, 0, "d"))


def test_what_users_name_cannot_become_part_of_the_page() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror='a' \">"
    result = SimulationResult(
        (replace(REQUESTS[0], error=evil),), SAMPLES, (Happening(1.0, evil, evil),), 8.0, 1, 0, "d"
    )
    shown = own(made(result, about=About(evil, evil, ((evil, evil),), evil)))
    for piece in ("<img", "<script>alert", "</script><script>"):
        assert piece not in shown
    assert "&lt;img src=x onerror=&#x27;a&#x27; &quot;&gt;" in shown
