"""The HTTP face: OpenAI's API in front of a Generator.

1. `Patience` bounds the waits for the client; `Boundary` names the request and notes its arrival; `read_body` takes
   no more than the limit.
2. `TextModel.prepare` makes the engine Request; `Generator.generate` owns it from there.
3. `Answer` sends what comes back, and gives the request up when its client does.

Knows nothing of workers, roles and placement: these are the Generator's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from engine.errors import InvalidRequest, ModelNotFound
from router.answer import Answer, Generation
from router.api import Generator, HealthView
from router.begin import begin_generation
from router.body import read_body
from router.boundary import Boundary, arrival_of
from router.chat_replies import ChatChunk, ChatReplies, ChatReply
from router.config import RouterConfig
from router.embeddings.answer import Embedded, EmbeddingAnswer, EmbeddingReply
from router.embeddings.body import EmbeddingBody, prepare
from router.embeddings.lanes import MAX_LANES, in_lanes
from router.errors import as_steelyard_error, error_response, shown
from router.keyed import Callers, Keyed, caller_of
from router.ledger import Ledger, Outcome
from router.ledger_log import LedgerLog, LedgersView, LineSink
from router.metered import as_tenant, metered
from router.metrics import CONTENT_TYPE, Metrics
from router.openapi import OF_GENERATION, TIMELINE_HEADER, add_docs_routes, route_docs
from router.patience import Patience
from router.replies import CompletionReplies, CompletionReply, ModelCard, ModelList
from router.responses.body import ResponseBody
from router.responses.records import RESPONSE_EVENTS
from router.responses.routes import Responses, add_response_routes
from router.responses.store import ResponseStore
from router.schema import ChatBody, CompletionBody
from router.step_history import StepHistory, StepsView
from router.targets import with_targets
from router.tenants import KeyRing
from router.text import Prepared, TextModel
from router.tokens import DetokenizeBody, TokenizeBody, add_token_routes
from router.tracing import RequestTrace, Traced

BODIES = (ChatBody, CompletionBody, EmbeddingBody, ResponseBody, TokenizeBody, DetokenizeBody)
EVENTS = (ChatChunk, CompletionReply, *RESPONSE_EVENTS)
CountText = Annotated[str, Query(json_schema_extra={"pattern": "^[0-9]{1,19}$"})]
PREPARE_STAGE = "prepare"  # arrival to Request: reading, checking, tokenising
MAX_LEDGERS_TOLD = 1024
NO_TELEMETRY = TelemetryConfig(tracing=False, metrics=False, logs=False)  # FastAPI's; Traced and Metrics are ours


def no_keys() -> KeyRing | None:
    return None


def only_one() -> int:
    return 1


def create_app(
    generator: Generator,
    model: TextModel,
    config: RouterConfig,
    *,
    steps: StepHistory,
    wall_clock: Callable[[], float],
    version: str = "dev",
    ledger_sink: LineSink | None = None,
    tracing: TracerProvider | None = None,
    keys: Callable[[], KeyRing | None] = no_keys,
    num_gateways: Callable[[], int] = only_one,
) -> FastAPI:
    """The ASGI application. `wall_clock` gives seconds since 1970, for `created` and the times of ledgers, whose lines
    go to `ledger_sink`. `keys`: those valid now; None: everyone may ask."""
    metrics = Metrics(model.name, generator.health, steps.tokens)
    ledgers = LedgerLog(wall_clock, ledger_sink)
    app = FastAPI(
        title="Steelyard",
        version=version,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
    )
    app.add_middleware(Keyed, callers=Callers(keys, num_gateways), open_paths=frozenset(config.open_paths))
    app.add_middleware(Boundary, new_request_id=generator.new_request_id, on_refused=metrics.count_refused)
    if tracing is not None:
        app.add_middleware(Traced, provider=tracing, model=model.name, wall_clock=wall_clock)
    if origins := config.cors.allow_origins:
        headers, methods = config.cors.allow_headers, ["GET", "POST", "DELETE"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_headers=headers, allow_methods=methods)
    app.add_middleware(Patience, config=config, on_let_go=metrics.count_let_go)  # the last one added is the outermost

    async def routing_error(_request: HttpRequest, error: Exception) -> Response:
        known = as_steelyard_error(error)
        metrics.count_refused(known.code)
        headers = error.headers if isinstance(error, HTTPException) else None
        return error_response(known, dict(headers or {}))

    app.add_exception_handler(HTTPException, routing_error)
    front = _Front(generator, model, config, metrics, wall_clock, f"fp_{version}", ledgers)
    _add_generation_routes(app, front)
    store = ResponseStore(config.max_stored_responses, config.max_stored_bytes)
    add_response_routes(app, Responses(front.begin, metrics, config, store, wall_clock))
    add_token_routes(app, model, config.max_body_bytes)
    _add_model_routes(app, ModelCard(id=model.name, created=int(wall_clock()), max_model_len=model.max_context))
    _add_operator_routes(app, generator, metrics, version)
    _add_debug_routes(app, steps, ledgers)
    add_docs_routes(app, BODIES, EVENTS, model.name)
    return app


@dataclass(frozen=True, slots=True)
class _Front:
    """All that it takes to answer a generation request."""

    generator: Generator
    model: TextModel
    config: RouterConfig
    metrics: Metrics
    wall_clock: Callable[[], float]
    fingerprint: str  # of what answers: the API's system_fingerprint
    ledgers: LedgerLog

    async def answer(self, http: HttpRequest, kind: type[ChatBody | CompletionBody]) -> Response:
        body = await read_body(http, kind, self._max_body_bytes(http))
        generation = await self.begin(http, body)
        replies = self._replies(body, generation.request.request_id)
        return Answer(generation, replies, self.metrics, stream=bool(body.stream), counts_on=body.counts_on)

    async def begin(self, http: HttpRequest, body: ChatBody | CompletionBody) -> Generation:
        """The generation that a body asks for; nothing of it is computed before its first output is awaited."""
        arrival = arrival_of(http)
        prepared = await self.model.prepare(body, arrival.request_id, self.generator.new_seed, self.config.deadline_s)
        prepared, ledger = self._owned(http, prepared, body.num_generated)
        generation = begin_generation(self.generator, self.model, body, prepared, ledger)
        caller = caller_of(http)
        generation.outputs = metered(generation.outputs, prepared.requests, caller)
        generation.charge = caller.quota.charge
        return generation

    async def embed(self, http: HttpRequest) -> Response:
        body = await read_body(http, EmbeddingBody, self._max_body_bytes(http))
        prepared = await prepare(self.model, body, arrival_of(http).request_id, self.config.deadline_s)
        prepared, ledger = self._owned(http, prepared, 0)
        lanes = in_lanes(self.generator, prepared.requests, min(MAX_LANES, self.config.max_live_requests))
        outputs = metered(lanes, prepared.requests, caller_of(http))
        embedded = Embedded(body, prepared.requests, outputs, ledger)
        return EmbeddingAnswer(embedded, self.model.name, self.metrics)

    def _max_body_bytes(self, http: HttpRequest) -> int:
        most = caller_of(http).tenant.limits.max_body_bytes or self.config.max_body_bytes
        return min(most, self.config.max_body_bytes)

    def _owned(self, http: HttpRequest, prepared: Prepared, num_answers: int) -> tuple[Prepared, Ledger]:
        """With its targets and as its tenant's, and the ledger that has begun with its arrival."""
        arrival = arrival_of(http)
        shown = http.headers.get(TIMELINE_HEADER) == "1"
        ledger = Ledger(arrival.time_s, is_shown=shown, on_end=self._on_end(http))
        prepare_s = asyncio.get_running_loop().time() - arrival.time_s
        tenant = caller_of(http).tenant
        requests = tuple(with_targets(one, http.headers, self.config, prepare_s, tenant) for one in prepared.requests)
        ledger.add_stages(((PREPARE_STAGE, prepare_s),))
        return as_tenant(replace(prepared, requests=requests), caller_of(http), num_answers), ledger

    def _on_end(self, http: HttpRequest) -> Callable[[Ledger, Outcome], None]:
        trace: RequestTrace | None = getattr(http.state, "trace", None)

        def told(ledger: Ledger, outcome: Outcome) -> None:
            self.ledgers.add(ledger, outcome)
            if trace is not None:
                trace.tell(ledger, outcome)

        return told

    def _replies(self, body: ChatBody | CompletionBody, request_id: str) -> ChatReplies | CompletionReplies:
        said = (request_id, self.model.name, int(self.wall_clock()), self.fingerprint, body.includes_usage)
        if isinstance(body, CompletionBody):
            return CompletionReplies(*said)
        return ChatReplies(*said, body.tool_use.is_legacy, self.model.style.has_short_ids)


class _DirectRoute(APIRoute):
    """Its endpoint takes the HTTP request as it is: nothing has to be found out, checked or put together for it, which
    FastAPI does even where there is nothing, and which is a good part of what a short answer costs."""

    def get_route_handler(self) -> Callable[[HttpRequest], Coroutine[object, object, Response]]:
        return self.endpoint


def _add_generation_routes(app: FastAPI, front: _Front) -> None:
    post = partial(app.router.add_api_route, methods=["POST"], route_class_override=_DirectRoute)

    async def chat_completions(request: HttpRequest) -> Response:
        """Answers a conversation, by the model's chat template."""
        return await front.answer(request, ChatBody)

    async def completions(request: HttpRequest) -> Response:
        """Goes on after a prompt."""
        return await front.answer(request, CompletionBody)

    async def embeddings(request: HttpRequest) -> Response:
        """Vectors of length 1 for texts, if the model's files or the config say how it embeds."""
        return await front.embed(request)

    docs = partial(route_docs, errors=OF_GENERATION)
    post("/v1/chat/completions", chat_completions, **docs(ChatReply, body="ChatBody", events=[ChatChunk]))
    post("/v1/completions", completions, **docs(CompletionReply, body="CompletionBody", events=[CompletionReply]))
    post("/v1/embeddings", embeddings, **docs(EmbeddingReply, body="EmbeddingBody"))


def _add_model_routes(app: FastAPI, card: ModelCard) -> None:
    @app.get("/v1/models", **route_docs(ModelList))
    async def models() -> ModelList:
        """The model that is served here."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}", **route_docs(ModelCard, (404,)))
    async def one_model(model_id: str) -> ModelCard:
        if model_id != card.id:
            raise ModelNotFound(f"The model '{shown(model_id)}' is not served here; '{card.id}' is", param="model")
        return card


class Version(BaseModel):
    version: str


def _add_operator_routes(app: FastAPI, generator: Generator, metrics: Metrics, version: str) -> None:
    @app.get("/health", **route_docs(HealthView, unhealthy=HealthView))
    async def health() -> Response:
        """200 if a canary went through prefill, wire and decode in time, else 503; the workers either way."""
        view = generator.health()
        return JSONResponse(asdict(view), 200 if view.healthy else 503)

    @app.get("/metrics", response_class=PlainTextResponse, **route_docs(None))
    async def prometheus() -> Response:
        """Prometheus text."""
        return Response(metrics.render(), media_type=None, headers={"content-type": CONTENT_TYPE})

    @app.get("/version", **route_docs(Version))
    async def show_version() -> Version:
        return Version(version=version)


def _add_debug_routes(app: FastAPI, steps: StepHistory, ledgers: LedgerLog) -> None:
    @app.get("/debug/steps", **route_docs(StepsView, (400,)))
    async def last_steps(after: CountText = "0") -> Response:
        """The workers' steps with numbers above `after`, oldest first; go on with the answer's `last`."""
        return JSONResponse(asdict(steps.since(_count("after", after))))

    @app.get("/debug/requests", **route_docs(LedgersView, (400,)))
    async def last_requests(last: CountText = "100") -> Response:
        """The ledgers of the `last` requests that ended, oldest first."""
        return JSONResponse(asdict(ledgers.last(min(_count("last", last), MAX_LEDGERS_TOLD))))


def _count(field: str, text: str) -> int:
    """InvalidRequest if it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise InvalidRequest(f"'{field}': '{shown(text)}' is not a number", param=field)
    return int(text)
