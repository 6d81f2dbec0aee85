"""Spans of requests by OpenTelemetry, for a collector that takes OTLP over HTTP.

1. `Traced` (ASGI middleware) begins the span of each generation request, as a child of the W3C context that came with
   it, and answers with the `traceparent` of that span;
2. calls to workers that are made for it carry that context on (router/trace_context.py);
3. at its end the ledger's stages become spans under it, side by side: their lengths are measured, and they are laid end
   to end in a request's order; attributes follow the conventions for generative AI;
4. a thread exports what has ended. Its queue is bounded: when the collector is slow or gone, spans are lost, no more.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.types import FinishReason
from router.ledger import Ledger, Outcome
from router.trace_context import tracing

NS = 1_000_000_000
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/responses": "chat",
}
_PROPAGATOR = TraceContextTextMapPropagator()


def make_provider(processor: SpanProcessor, sampling_ratio: float, version: str) -> TracerProvider:
    """A caller's decision to sample is followed; of the others this share is sampled."""
    resource = Resource.create({"service.name": "steelyard", "service.version": version})
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(sampling_ratio)), resource=resource)
    provider.add_span_processor(processor)
    return provider


class RequestTrace:
    """The span of one request, from its arrival to its end."""

    def __init__(self, tracer: Tracer, model: str, operation: str, headers: Headers, start_s: float) -> None:
        self._tracer = tracer
        self._start_s = start_s
        parent = _PROPAGATOR.extract(dict(headers), Context())
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "steelyard",
            "gen_ai.request.model": model,
        }
        self._span: Span = tracer.start_span(
            f"{operation} {model}", parent, SpanKind.SERVER, attributes, start_time=int(start_s * NS)
        )

    @property
    def headers(self) -> dict[str, str]:
        """Its context, as others are told."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        return carrier

    def tell(self, ledger: Ledger, outcome: Outcome) -> None:
        """What was generated, and where its time went."""
        self._span.set_attributes(
            {
                "gen_ai.response.id": outcome.request_id,
                "gen_ai.response.finish_reasons": (outcome.end.value,),
                "gen_ai.usage.input_tokens": outcome.prompt_tokens,
                "gen_ai.usage.output_tokens": outcome.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": outcome.cached_tokens,
            }
        )
        if ledger.ttft_s is not None:
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", ledger.ttft_s)
        if outcome.end is FinishReason.ERROR:
            self._span.set_status(Status(StatusCode.ERROR))
        if self._span.is_recording():
            self._add_stages(ledger)

    def end(self, status: int, now_s: float) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end(int(now_s * NS))

    def _add_stages(self, ledger: Ledger) -> None:
        under, at_s = set_span_in_context(self._span), self._start_s
        for name, duration_s in ledger.stages:
            span = self._tracer.start_span(name, under, start_time=int(at_s * NS))
            at_s += duration_s
            span.end(int(at_s * NS))


class Traced:
    """ASGI middleware. `wall_clock`: seconds since 1970."""

    def __init__(self, app: ASGIApp, provider: TracerProvider, model: str, wall_clock: Callable[[], float]) -> None:
        self._app = app
        self._tracer = provider.get_tracer("steelyard")
        self._model = model
        self._wall_clock = wall_clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = OPERATIONS.get(scope.get("path", "")) if scope["type"] == "http" else None
        if operation is None or scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        trace = RequestTrace(self._tracer, self._model, operation, Headers(scope=scope), self._wall_clock())
        headers, status = trace.headers, 499  # the client went away before it got an answer

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(headers)
            await send(message)

        scope.setdefault("state", {})["trace"] = trace
        try:
            with tracing(headers):
                await self._app(scope, receive, send_named)
        finally:
            trace.end(status, self._wall_clock())
