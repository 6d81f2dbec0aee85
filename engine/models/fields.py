"""Read one field of a model's configuration, checked: what is missing or of the wrong type is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import ModelError


def integer(fields: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = present(fields, key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ModelError(f"{key} must be an integer, not {value!r}", param=key)


def number(fields: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = present(fields, key, default)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ModelError(f"{key} must be a number, not {value!r}", param=key)


def flag(fields: Mapping[str, object], key: str, default: bool = False) -> bool:
    value = present(fields, key, default)
    if isinstance(value, bool):
        return value
    raise ModelError(f"{key} must be true or false, not {value!r}", param=key)


def present(fields: Mapping[str, object], key: str, default: object) -> object:
    """The field's value, or the default where it is absent or null."""
    value = fields.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"the model's configuration has no {key}", param=key)
    return value


def token_ids(key: str, *sources: Mapping[str, object]) -> tuple[int, ...]:
    """Every id under `key`, one or a list, in the order of the sources and without repeats."""
    found: dict[int, None] = {}
    for source in sources:
        value = source.get(key)
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(item, int) or isinstance(item, bool):
                raise ModelError(f"{key} must hold token ids, not {item!r}", param=key)
            found[item] = None
    return tuple(found)


def refused(field: str, value: object, supported: Sequence[object]) -> ModelError:
    names = ", ".join(map(repr, supported))
    return ModelError(f"{field} is {value!r}, which is not supported (supported: {names})", param=field)
