"""One call in JSON: `{"name": ..., "arguments": {...}}` or with "parameters", from its beginning or as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from router.parts import Call

_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')


def name_in(head: str) -> str | None:
    """The function's name, if `head` is a call up to the bracket that opens its arguments."""
    found = _HEAD.fullmatch(head)
    name = _json_of(found[1]) if found else None
    return name if isinstance(name, str) else None


def call_in(text: str) -> Call | None:
    """The call that a whole object is, whatever the order of its keys; None if it is none."""
    value = _json_of(text)
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = _arguments(value.get("arguments", value.get("parameters")))
    return None if arguments is None else Call(value["name"], arguments)


def _arguments(value: object) -> str | None:
    if value is None:
        return "{}"
    if isinstance(value, str):  # written as JSON in JSON
        return value if isinstance(_json_of(value), Mapping) else None
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else None


def _json_of(text: str) -> object:
    """None for what is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
