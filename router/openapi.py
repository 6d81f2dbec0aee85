"""The OpenAPI document of the HTTP face: what FastAPI finds out by itself, and what it cannot know.

1. Routes describe themselves by `route_docs`: their replies, the errors that they may end with, and the body that we
   read ourselves, which stands in the components as `request.<model>`.
2. `document` puts the whole together: bodies, headers, and `model` as the one name that is served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypedDict

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, Response

from router.docs_page import HEADERS, docs_page
from router.errors import ErrorReply
from router.targets import CLASS, DEADLINE, MAX_MS, TPOT, TTFT

Models = Sequence[type[BaseModel]]
Json = dict[str, Any]  # a part of the document

DESCRIPTION = "OpenAI's API in front of separate prefill and decode workers. Unknown fields are refused by name."
ERRORS = {
    400: "A field is wrong, or not supported yet; `param` names it.",
    401: "No API key was sent, or one that nobody has; only where `router.keys_file` or the environment names keys.",
    403: "The key's tenant is disabled.",
    404: "There is no such model, response or route.",
    405: "The route does not take this method.",
    408: "The body did not arrive within `router.read_timeout_s`.",
    413: "The body has more than `router.max_body_bytes`.",
    429: "No room now, or beyond what its tenant may use; `Retry-After` says when to come back.",
    431: "Request line and headers have more than 64 KiB.",
    500: "The server failed at this request.",
    503: "No worker can be reached, too many connections, or the gateway is shutting down.",
    504: "`router.deadline_s` passed.",
}
EVERYWHERE = (401, 403, 431, 500, 503)
OF_BODIES = (400, 404, 408, 413)  # of a route that reads a body
OF_GENERATION = (*OF_BODIES, 429, 504)
TIMELINE_HEADER = "x-timeline"  # 1: the answer carries its ledger
MILLISECONDS: Json = {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_MS}
FLAG: Json = {"type": "string", "enum": ["0", "1"]}
HEADERS_OF_GENERATION: tuple[tuple[str, str, Json], ...] = (
    (TTFT, "The first token is wanted within so many milliseconds.", MILLISECONDS),
    (TPOT, "Each further one within so many, on average.", MILLISECONDS),
    (DEADLINE, "All of it within so many; never later than `router.deadline_s`.", MILLISECONDS),
    (CLASS, "A class of `router.classes`, for what the other headers do not say.", {"type": "string", "minLength": 1}),
    (TIMELINE_HEADER, "1: the answer carries where its time went.", FLAG),
    ("traceparent", "W3C trace context; the request's span becomes its child.",
     {"type": "string", "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$"}),
)  # fmt: skip
COMPONENT = "#/components/schemas/{model}"
REFERENCE = "#/components/schemas/request.{model}"


class RouteDocs(TypedDict):
    """Arguments of FastAPI's route decorators."""

    responses: dict[int | str, dict[str, Any]]
    openapi_extra: dict[str, Any] | None


def route_docs(
    reply: type[object] | None,
    errors: Sequence[int] = (),
    body: str | None = None,
    events: Models = (),
    unhealthy: type[object] | None = None,
) -> RouteDocs:
    """`body` names the model of a JSON body, `events` are those that it may stream; `unhealthy` is what a route
    that tells of health answers with 503."""
    responses: dict[int | str, Json] = {
        status: _response(ERRORS[status], ErrorReply) for status in (*errors, *EVERYWHERE)
    }
    responses[200] = _response("Done", reply)
    if events:
        responses[200]["content"] = {"text/event-stream": {"schema": _stream_schema(events)}}
    if unhealthy is not None:
        responses[503] = _response("Not healthy", unhealthy)
    extra = _body_docs(body) if body else {}
    if errors == OF_GENERATION:
        extra["parameters"] = [_header(*told) for told in HEADERS_OF_GENERATION]
    return RouteDocs(responses=responses, openapi_extra=extra or None)


def _header(name: str, words: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "required": False, "description": words, "schema": schema}


def _response(description: str, model: type[object] | None) -> Json:
    return {"description": description, **({"model": model} if model else {})}


def _stream_schema(events: Models) -> Json:
    """Of one event, as OpenAPI 3.2 describes it, too."""
    told = [{"$ref": COMPONENT.format(model=event.__name__)} for event in (*events, ErrorReply)]
    record = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": told}}
    words = "one server-sent event, where 'stream' is true; after a fault, the last one is an ErrorReply or ErrorEvent"
    properties = {"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, record]}}
    return {"type": "object", "description": words, "properties": properties, "required": ["data"]}


def _body_docs(body: str) -> Json:
    schema = {"$ref": REFERENCE.format(model=body)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_docs_routes(app: FastAPI, bodies: Models, events: Models, served_model: str) -> None:
    """After all other routes. The document and its page are made when somebody first asks for them."""

    @cache
    def made() -> Json:
        return document(app, bodies, events, served_model)

    app.openapi = made

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(made()), headers=HEADERS)


def document(app: FastAPI, bodies: Models, events: Models, served_model: str) -> Json:
    """`events` are those that streams are made of."""
    made = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    _, defined = models_json_schema([(body, "validation") for body in bodies], ref_template=REFERENCE)
    _, told = models_json_schema([(event, "serialization") for event in events], ref_template=COMPONENT)
    schemas = made["components"]["schemas"]
    schemas |= told["$defs"]
    schemas |= {f"request.{name}": schema for name, schema in defined["$defs"].items()}
    for body in bodies:
        _narrow(schemas[f"request.{body.__name__}"]["properties"]["model"], served_model)
    for operation in [one for path in made["paths"].values() for one in path.values()]:
        operation["responses"].pop("422", None)  # FastAPI's word for faults that we answer with 400
        for status, response in operation["responses"].items():
            response["headers"] = dict(_headers(int(status)))
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return made


def _narrow(field: Json, served_model: str) -> None:
    """To the one name that is served, or null where it may be left out."""
    is_optional = "anyOf" in field
    for key in ("anyOf", "type", "minLength"):
        field.pop(key, None)
    field["enum"] = [served_model, None] if is_optional else [served_model]


def _headers(status: int) -> Iterator[tuple[str, Json]]:
    yield "x-request-id", {"description": "names the request in our logs", "schema": {"type": "string"}}
    if status in (429, 503):
        yield "Retry-After", {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
