"""What /metrics shows after requests of every fate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from engine.errors import Overloaded, WorkerLost
from engine.types import FinishReason, KvTransfer, Request, TokenOutput
from router.api import ControlView
from router.prediction_error import PredictionError
from tests.router.fakes import (
    CHAT,
    COMPLETIONS,
    MODEL,
    FakeGenerator,
    completion,
    fail,
    healthy,
    make_client,
    output,
    worker,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(generator: FakeGenerator, *bodies: dict) -> Samples:
    async with make_client(generator) as client:
        for body in bodies:
            await client.post(COMPLETIONS, json=body)
        await client.post(CHAT, json={})
        reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(reply.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    if name.startswith("vllm:"):
        labels["model_name"] = MODEL
    return samples[name, tuple(sorted(labels.items()))]


async def test_finished_requests_are_counted_under_the_names_that_dashboards_know() -> None:
    samples = await scrape(FakeGenerator(), completion("hello", max_tokens=3), completion("hello", stream=True))
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(samples, "vllm:prompt_tokens_total") == 12
    assert value(samples, "vllm:generation_tokens_total") == 3 + 6
    assert value(samples, "vllm:prefix_cache_queries_total") == 12
    assert value(samples, "vllm:prefix_cache_hits_total") == 6
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 2
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 2 + 5
    assert value(samples, "vllm:e2e_request_latency_seconds_count") == 2
    assert value(samples, "vllm:request_time_per_output_token_seconds_count") == 2
    assert value(samples, "steelyard_handoff_gap_seconds_count", model_name=MODEL) == 2
    for stage in ("prepare", "decode", "unattributed"):
        assert value(samples, "steelyard_stage_seconds_count", stage=stage) == 2


async def test_a_transfer_is_counted_under_its_carrier() -> None:
    async def handed_off(request: Request) -> AsyncIterator[TokenOutput]:
        yield output(request, 0, (97,))
        yield replace(output(request, 1, (98,)), transfer=KvTransfer("shm", 100, 75, 2.0, 0.5))
        yield output(request, 2, (99,), FinishReason.LENGTH)

    samples = await scrape(FakeGenerator(handed_off), completion(), completion(stream=True))
    for name, total in (("request_seconds", 4.0), ("exposed_seconds", 1.0), ("hidden_ratio", 1.5)):
        for end, wanted in (("count", 2), ("sum", total)):
            assert value(samples, f"steelyard_kv_transfer_{name}_{end}", model_name=MODEL, carrier="shm") == wanted


async def test_refused_requests_are_counted_by_code_only() -> None:
    samples = await scrape(FakeGenerator(fail(Overloaded("full"))), completion(), completion(stream=True))
    assert value(samples, "steelyard_requests_rejected_total", code="overloaded") == 2
    assert value(samples, "steelyard_requests_rejected_total", code="invalid_request") == 1
    assert not any(name == "vllm:request_success_total" for name, _ in samples)


async def test_a_broken_stream_counts_as_an_error() -> None:
    samples = await scrape(FakeGenerator(fail(WorkerLost("gone"), after=1)), completion(stream=True))
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 1


async def test_workers_are_shown_as_they_are_at_the_scrape() -> None:
    generator = FakeGenerator()
    generator.view = healthy(worker("p0"), worker("d0", "decode", num_leaked_blocks=4))
    samples = await scrape(generator)
    assert value(samples, "vllm:num_requests_running", engine="p0", role="prefill") == 2
    assert value(samples, "vllm:num_requests_waiting", engine="d0", role="decode") == 1
    assert value(samples, "vllm:kv_cache_usage_perc", engine="d0", role="decode") == 0.25
    assert value(samples, "steelyard_prefix_hits", model_name=MODEL, engine="d0", role="decode") == 30
    assert value(samples, "steelyard_host_tier_hits", model_name=MODEL, engine="d0", role="decode") == 6
    assert value(samples, "steelyard_host_tier_queries", model_name=MODEL, engine="d0", role="decode") == 8
    assert value(samples, "steelyard_kv_leaked_blocks", model_name=MODEL, engine="d0", role="decode") == 4
    assert value(samples, "steelyard_workers", role="prefill") == 1
    assert value(samples, "steelyard_membership_version") == 7
    assert value(samples, "steelyard_canary_age_seconds") == 0.5
    assert value(samples, "steelyard_healthy") == 1
    generator.view = replace(healthy(worker("p1")), canary_age_s=None)
    samples = await scrape(generator)
    assert ("steelyard_canary_age_seconds", ()) not in samples
    assert not any(("engine", "p0") in labels for _, labels in samples)


async def test_two_gateways_in_one_process_share_no_numbers() -> None:
    first, second = await asyncio.gather(scrape(FakeGenerator(), completion()), scrape(FakeGenerator()))
    assert value(first, "vllm:prompt_tokens_total") == 6
    assert value(second, "vllm:prompt_tokens_total") == 0


async def test_placements_that_were_given_up_are_counted_by_what_ended_them() -> None:
    generator = FakeGenerator()
    generator.view = replace(healthy(), retries=(("lease_lost", 2), ("overloaded", 5)))
    samples = await scrape(generator)
    assert value(samples, "steelyard_request_retries_total", reason="lease_lost") == 2
    assert value(samples, "steelyard_request_retries_total", reason="overloaded") == 5


async def test_the_controllers_word_is_shown() -> None:
    generator = FakeGenerator()
    control = ControlView(
        "auto", "hold", best_prefill=2, num_flips=3, num_undone=1, num_added=4, num_removed=2, num_coming=1
    )  # fmt: skip
    generator.view = replace(healthy(), control=control)
    samples = await scrape(generator)
    assert value(samples, "steelyard_flips_total", outcome="done") == 3
    assert value(samples, "steelyard_flips_total", outcome="undone") == 1
    assert value(samples, "steelyard_workers_changed_total", change="added") == 4
    assert value(samples, "steelyard_workers_changed_total", change="removed") == 2
    assert value(samples, "steelyard_workers_coming") == 1
    assert value(samples, "steelyard_wanted_prefill_workers") == 2
    assert ("steelyard_flip_seconds", ()) not in samples


async def test_prediction_errors_are_shown_by_what_was_predicted() -> None:
    generator = FakeGenerator()
    view = replace(healthy(), prediction=(PredictionError("prefill", 40, 0.125, 0.25),))
    generator.view = view
    samples = await scrape(generator)
    assert value(samples, "steelyard_prediction_error_ratio", of="prefill", quantile="0.5") == 0.125
    assert value(samples, "steelyard_prediction_error_ratio", of="prefill", quantile="0.9") == 0.25
    assert value(samples, "steelyard_predictions_judged", of="prefill") == 40


async def test_vllm_s_times_of_phases_and_its_tokens_per_step_are_there() -> None:
    async with make_client(FakeGenerator()) as client:
        await client.post(COMPLETIONS, json=completion("abc"))
        text = (await client.get("/metrics")).text
    for name in ("queue", "prefill", "decode", "inference"):
        assert f'vllm:request_{name}_time_seconds_count{{model_name="{MODEL}"}} 1.0' in text
    assert f'vllm:inter_token_latency_seconds_count{{model_name="{MODEL}"}}' in text
    assert f'vllm:iteration_tokens_total_bucket{{le="8.0",model_name="{MODEL}"}} 0.0' in text
