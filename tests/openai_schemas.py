"""The published schemas of OpenAI's API, where they are: shared/data/openai-openapi, beside the repository."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

FOLDERS = [parent / "shared/data/openai-openapi" for parent in Path(__file__).resolve().parents]
DOCUMENT = next((folder / "openapi.yaml" for folder in FOLDERS if (folder / "openapi.yaml").exists()), None)


def check_schema(name: str, *replies: object) -> None:
    """Each of them is a `name`; skips the test where the schemas are not."""
    if DOCUMENT is None:
        pytest.skip("shared/data/openai-openapi is not here")
    validator = _validator(name)
    for reply in replies:
        validator.validate(reply)


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": _components()})


@cache
def _components() -> dict[str, Any]:
    assert DOCUMENT is not None
    return _with_nulls(yaml.load(DOCUMENT.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["components"])


def _with_nulls(node: Any) -> Any:
    """The document still has some of OpenAPI 3.0's `nullable`, which JSON Schema does not know."""
    if isinstance(node, list):
        return [_with_nulls(one) for one in node]
    if not isinstance(node, dict):
        return node
    same = {key: _with_nulls(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [same, {"type": "null"}]} if node.get("nullable") is True else same
