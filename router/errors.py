"""Errors on their way out: every fault becomes OpenAI's error format, one message and the path of the field.

1. `refusal` turns pydantic's list of complaints into one InvalidRequest.
2. `as_steelyard_error` turns whatever else was raised into an error of our tree; unexpected ones tell nothing.
3. `error_response` and `error_event` write it, as an answer or as the last event of a stream.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import InvalidRequest, SteelyardError

MAX_SHOWN_CHARS = 200  # of anything that the client wrote
FIELD_NAME = re.compile("[a-z_]+")  # what union members are called is written otherwise
UNSAID = "The server failed at this request"  # what is told of an unexpected fault
PLAIN_WORDS = {"missing": "This field is required", "extra_forbidden": "Unknown field"}


class BodyTooLarge(SteelyardError):
    code = "body_too_large"
    status = 413


class HeadTooLarge(SteelyardError):
    code = "head_too_large"
    status = 431


class RequestTimeout(SteelyardError):
    """The body did not arrive in time. The rest of it may still come, so the connection cannot be used again."""

    code = "request_timeout"
    status = 408


class RouteNotFound(SteelyardError):
    code = "not_found"
    status = 404


class MethodNotAllowed(SteelyardError):
    code = "method_not_allowed"
    status = 405


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error format."""

    error: ErrorBody


def shown(text: str) -> str:
    """Text of the client's, cut to a length that fits a message."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + "..."


def refusal(error: ValidationError, document: object = None) -> InvalidRequest:
    """The first complaint about a body, with the dotted path of its field as `param`. `document` is the body, if it is
    known: names of union members are no steps of a path in it."""
    complaints = error.errors(include_url=False, include_input=False)
    first = complaints[0]
    words = PLAIN_WORDS.get(first["type"], first["msg"])
    steps = first["loc"] if document is None else _path(first["loc"], document, first["type"] == "missing")
    path = shown(".".join(map(str, steps)))
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    return InvalidRequest(f"'{path}': {words}{more}" if path else f"{words}{more}", param=path or None)


def _leads_on(node: object, step: int | str) -> bool:
    if isinstance(node, list):
        return isinstance(step, int) and step < len(node)
    return isinstance(node, dict) and step in node


def _path(loc: tuple[int | str, ...], document: object, is_missing: bool) -> Iterator[int | str]:
    """The steps that lead somewhere; with `is_missing` the last one names what is not there."""
    node: Any = document
    for index, step in enumerate(loc[: len(loc) - is_missing]):
        if _leads_on(node, step):
            node = node[step]
            yield step
        elif index == len(loc) - 1 and isinstance(node, dict) and FIELD_NAME.fullmatch(str(step)):
            yield step  # a default that is none
    if is_missing:
        yield loc[-1]


def as_steelyard_error(error: Exception) -> SteelyardError:
    """An unexpected exception becomes a plain 500 that says nothing about our inside."""
    if isinstance(error, SteelyardError):
        return error
    if isinstance(error, HTTPException):
        return _routing_error(error)
    return SteelyardError(UNSAID)


def _routing_error(error: HTTPException) -> SteelyardError:
    if error.status_code == HTTPStatus.NOT_FOUND:
        return RouteNotFound("There is no such route")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return MethodNotAllowed("This route does not take this method")
    return InvalidRequest(str(error.detail)) if error.status_code < 500 else SteelyardError(UNSAID)


def _type_of(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_reply(error: SteelyardError) -> ErrorReply:
    body = ErrorBody(message=error.message, type=_type_of(error.status), param=error.param, code=error.code)
    return ErrorReply(error=body)


def error_response(error: SteelyardError, headers: dict[str, str] | None = None) -> Response:
    """The error as a whole answer; a refusal for load says when to come back, in whole seconds of at least 1."""
    headers = dict(headers or {})
    if error.status == HTTPStatus.REQUEST_TIMEOUT:
        headers["Connection"] = "close"
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.TOO_MANY_REQUESTS or error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    return Response(error_reply(error).model_dump_json(), error.status, headers, "application/json")


def error_event(error: SteelyardError) -> bytes:
    """The error as the last event of a stream that had begun."""
    return b"data: " + error_reply(error).model_dump_json().encode() + b"\n\n"
