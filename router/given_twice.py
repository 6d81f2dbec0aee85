"""A key that JSON text gives twice in one object. Readers differ in which value they take, so neither is taken."""

from __future__ import annotations

import json


class _Twice(dict[str, object]):
    """An object in which `key` is given twice."""

    key = ""


def given_twice(raw: bytes) -> str | None:
    """The dotted path of such a key, or None. `raw` is JSON in UTF-8 of bounded depth."""
    has_found = False

    def as_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal has_found
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        has_found = True
        twice = _Twice(made)
        seen: dict[str, None] = {}
        for key, _ in pairs:
            if key in seen:
                twice.key = key
                break
            seen[key] = None
        return twice

    value = json.loads(raw, object_pairs_hook=as_object)
    return _path_in(value, "") if has_found else None


def _path_in(value: object, prefix: str) -> str | None:
    if isinstance(value, _Twice):
        return prefix + value.key
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    paths = (_path_in(child, f"{prefix}{step}.") for step, child in children)
    return next((path for path in paths if path is not None), None)
