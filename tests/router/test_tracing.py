"""One span per request with its stages side by side under it; context in and out; a collector, alive or dead."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from cluster.spans import open_provider
from engine.errors import Unavailable
from router.config import RouterConfig, TracingConfig
from router.gateway import create_app
from router.step_history import StepHistory
from router.trace_context import trace_headers
from router.tracing import make_provider
from tests.router.fakes import CHAT, CREATED, MODEL, FakeGenerator, chat, echo, fail, text_model

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CALLER = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}


def client_of(generator: FakeGenerator, provider: TracerProvider | None) -> httpx.AsyncClient:
    app = create_app(
        generator, text_model(), RouterConfig(), steps=StepHistory(), wall_clock=lambda: CREATED + 0.5, tracing=provider
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def traced(
    generator: FakeGenerator, headers: dict[str, str], sampling_ratio: float = 1.0
) -> tuple[httpx.Response, list[ReadableSpan]]:
    exporter = InMemorySpanExporter()
    async with client_of(generator, make_provider(SimpleSpanProcessor(exporter), sampling_ratio, "1")) as client:
        reply = await client.post(CHAT, json=chat("hello"), headers=headers)
    return reply, list(exporter.get_finished_spans())


async def test_stages_are_siblings_under_the_request_which_is_the_callers_child() -> None:
    reply, spans = await traced(FakeGenerator(), FROM_CALLER)
    (request,) = [span for span in spans if span.name == f"chat {MODEL}"]
    stages = [span for span in spans if span is not request]
    assert {span.name for span in stages} == {"prepare", "decode", "unattributed"}
    own = request.get_span_context()
    assert own is not None
    assert all(span.parent is not None and span.parent.span_id == own.span_id for span in stages)
    assert all(span.parent is not None and span.parent.trace_id == int(TRACE_ID, 16) for span in spans)
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == PARENT_ID
    assert reply.headers["traceparent"] == f"00-{TRACE_ID}-{own.span_id:016x}-01"
    assert reply.headers["tracestate"] == "vendor=1"


async def test_a_request_is_described_in_the_conventions_words() -> None:
    reply, spans = await traced(FakeGenerator(), {})
    attributes = dict(next(span for span in spans if span.parent is None).attributes or {})
    assert attributes.pop("gen_ai.response.time_to_first_chunk") == pytest.approx(0.0, abs=60.0)
    usage = reply.json()["usage"]
    assert attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "steelyard", "gen_ai.request.model": MODEL,
        "gen_ai.response.id": "r1", "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "http.response.status_code": 200,
    }  # fmt: skip


async def test_a_request_that_fails_has_an_ended_span_that_says_so() -> None:
    reply, spans = await traced(FakeGenerator(fail(Unavailable("no"))), {})
    root = next(span for span in spans if span.parent is None)
    assert (reply.status_code, root.status.status_code) == (503, StatusCode.ERROR)
    assert root.end_time is not None


@pytest.mark.parametrize(("ratio", "flag", "is_sampled"), [(0.0, "01", True), (1.0, "00", False)])
async def test_the_callers_decision_to_sample_is_followed(ratio: float, flag: str, is_sampled: bool) -> None:
    caller = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flag}"}
    reply, spans = await traced(FakeGenerator(), caller, ratio)
    assert bool(spans) is is_sampled
    assert reply.headers["traceparent"].endswith(f"-{flag}")


async def test_what_is_called_for_a_request_has_its_context() -> None:
    seen: list[tuple[tuple[str, str], ...]] = []

    async def script(request):
        seen.append(trace_headers())
        async for output in echo(request):
            yield output

    reply, _ = await traced(FakeGenerator(script), FROM_CALLER)
    assert dict(seen[0]) == {name: reply.headers[name] for name in ("traceparent", "tracestate")}
    assert trace_headers() == ()


@dataclass
class Collector:
    """A server that takes OTLP over HTTP."""

    received: list[ExportTraceServiceRequest] = field(default_factory=list)

    def __enter__(self) -> str:
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("by_environment", [False, True])
async def test_a_collector_gets_the_spans(by_environment: bool) -> None:
    collector = Collector()
    with collector as url:
        named = {"OTEL_EXPORTER_OTLP_ENDPOINT": url} if by_environment else {}
        provider = open_provider(TracingConfig(endpoint="" if by_environment else url), named, "1.2.3")
        assert provider is not None
        async with client_of(FakeGenerator(), provider) as client:
            await client.post(CHAT, json=chat("hello"))
        await asyncio.to_thread(provider.shutdown)
    spans = [
        span for one in collector.received for each in one.resource_spans
        for scope in each.scope_spans for span in scope.spans
    ]  # fmt: skip
    assert {span.name for span in spans} == {f"chat {MODEL}", "prepare", "decode", "unattributed"}


async def test_a_dead_collector_harms_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        url = f"http://127.0.0.1:{closed_soon.getsockname()[1]}"
    provider = open_provider(TracingConfig(endpoint=url), {}, "1")
    async with client_of(FakeGenerator(), provider) as client:
        replies = [await client.post(CHAT, json=chat("hello")) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200] * 3


def test_nothing_is_traced_where_no_collector_is_named() -> None:
    assert open_provider(TracingConfig(), {}, "1") is None
