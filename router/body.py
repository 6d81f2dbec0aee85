"""Reads the JSON body of one request, never holding more than the limit."""

from __future__ import annotations

import asyncio
import json
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request as HttpRequest

from engine.errors import InvalidRequest
from router.errors import BodyTooLarge, refusal, shown
from router.given_twice import given_twice
from router.schema import ApiModel

LONG_BODY_BYTES = 64 * 2**10  # longer ones are parsed off the loop

Body = TypeVar("Body", bound=ApiModel)


async def read_body(request: HttpRequest, kind: type[Body], max_bytes: int) -> Body:
    """The body as a `kind`. BodyTooLarge beyond `max_bytes`; InvalidRequest for broken JSON and wrong fields.

    The Content-Type is not looked at: clients send JSON under many names.
    """
    raw = await _read_bytes(request, max_bytes)
    return await asyncio.to_thread(_parse, raw, kind) if len(raw) > LONG_BODY_BYTES else _parse(raw, kind)


def _parse(raw: bytes, kind: type[Body]) -> Body:
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        raise refusal(error, _document(raw)) from None
    if (path := given_twice(raw)) is not None:
        raise InvalidRequest(f"'{shown(path)}': This field is given twice", param=shown(path))
    return body


def _document(raw: bytes) -> object:
    """The body as it is, to find a path in; None where it is no JSON, or holds what Python cannot read."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


async def _read_bytes(request: HttpRequest, max_bytes: int) -> bytes:
    """A declared length is judged before anything is read, a chunked body while it comes."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 20 and int(declared) > max_bytes:
        raise BodyTooLarge(f"The body has {declared} bytes, the limit is {max_bytes}")
    raw = bytearray()
    async for chunk in request.stream():
        if len(raw) + len(chunk) > max_bytes:
            raise BodyTooLarge(f"The body has more than {max_bytes} bytes")
        raw += chunk
    return bytes(raw)
