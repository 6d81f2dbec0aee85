"""The trace of a request reaches its workers, and what they measured stands as stages under the request's span."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest

from tests.cluster.harness import local_cluster
from tests.cluster.tiny_model import write_tiny_model
from tests.router.test_tracing import FROM_CALLER, TRACE_ID, Collector

OF_WORKERS = {"prefill_queue", "prefill", "decode_wait"}


async def test_workers_are_told_the_trace_and_their_stages_are_under_its_span(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, collector = write_tiny_model(tmp_path / "model"), Collector()
    body = {"model": "model", "prompt": "x" * 40, "max_tokens": 5, "ignore_eos": True}
    with collector as url, caplog.at_level(logging.DEBUG, "cluster.rpc.server"):
        settings = {"model.name": str(folder), "engine.runner": "thread", "router.tracing.endpoint": url}
        async with local_cluster(settings) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
            reply = await client.post("/v1/completions", json=body, headers=FROM_CALLER)
            embedded = await client.post("/v1/embeddings", json={"model": "model", "input": "x"}, headers=FROM_CALLER)
    told = [one.getMessage() for one in caplog.records if TRACE_ID in one.getMessage()]
    assert len(told) == 1 and told[0].endswith(f"trace {reply.headers['traceparent']}")
    spans = [
        span
        for export in collector.received
        for resource in export.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    own = bytes.fromhex(reply.headers["traceparent"].split("-")[2])
    stages = {span.name for span in spans if span.parent_span_id == own}
    assert stages >= OF_WORKERS, stages
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    assert embedded.headers["traceparent"].startswith(f"00-{TRACE_ID}-")
