"""The page at /docs: the OpenAPI document as plain HTML. It loads nothing, from anywhere, and runs no script."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Json = Mapping[str, Any]

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; border-top: 1px solid #ccc; padding-top: 1rem }
code, .method { font-family: ui-monospace, monospace; font-size: .92em }
.method { text-transform: uppercase; background: #246; color: #fff; padding: .1rem .4rem; border-radius: .2rem }
table { border-collapse: collapse; width: 100% }
td { text-align: left; vertical-align: top; padding: .15rem .6rem .15rem 0 }
td:first-child { white-space: nowrap } summary { cursor: pointer } .required { color: #a22 }
"""


def docs_page(document: Json) -> str:
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style>",
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        f"<p>{escape(info.get('description', ''))}</p>",
        "<p>For machines: <a href=/openapi.json>/openapi.json</a></p>",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(document, path, method, operation)
    return "\n".join(parts)


def _operation(document: Json, path: str, method: str, operation: Json) -> Iterator[str]:
    yield f"<h2><span class=method>{escape(method)}</span> <code>{escape(path)}</code></h2>"
    yield f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>"
    if parameters := operation.get("parameters"):
        rows = [(one["name"], one.get("required", False), one["in"], one.get("description", "")) for one in parameters]
        yield _table("Parameters", rows)
    if body := operation.get("requestBody"):
        schema = _resolved(document, body["content"]["application/json"]["schema"])
        yield _fields(document, "Body", schema)
    answers = sorted(operation["responses"].items())
    rows = [(status, False, ", ".join(one.get("content", ())), one["description"]) for status, one in answers]
    yield _table("Answers", rows)


def _fields(document: Json, title: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = [
        (name, name in required, _kind(document, field), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    ]
    return _table(title, rows)


def _kind(document: Json, field: Json) -> str:
    """A short word for what a field may be."""
    if "$ref" in field:
        target = _resolved(document, field)
        return target.get("title", "") if target.get("type") == "object" else _kind(document, target)
    if "enum" in field or "const" in field:
        return " | ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if options := field.get("anyOf") or field.get("oneOf"):
        return " | ".join(dict.fromkeys(_kind(document, option) for option in options))
    if field.get("type") == "array":
        return f"array of {_kind(document, field.get('items', {}))}"
    bounds = [f"{sign} {field[key]}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([str(field.get("type", "any")), *bounds])


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _resolved(document: Json, schema: Json) -> Json:
    if "$ref" not in schema:
        return schema
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]


def _table(title: str, rows: list[tuple[str, bool, str, str]]) -> str:
    lines = [
        f"<tr><td><code>{escape(str(name))}</code>{' <span class=required>required</span>' * is_required}"
        f"<td>{escape(kind)}<td>{escape(words)}"
        for name, is_required, kind, words in rows
    ]
    return f"<details><summary>{title}</summary><table>{''.join(lines)}</table></details>"
