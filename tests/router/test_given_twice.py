"""A key that is given twice is found wherever it is, and named by its path."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.given_twice import given_twice

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ('{"a": 1, "a": 1}', "a"),
        ('{"a": 1, "b": 2, "a": {"b": 1}}', "a"),
        ('{"a": [1, {"b": {"c": 1, "c": 2}}]}', "a.1.b.c"),
        ('[{"a": 1}, {"a": 1, "\\u0061": 2}]', "1.a"),
        ('{"a": {"b": 1, "b": 2}, "a": 3}', "a"),
        ('{"": 1, "": 2}', ""),
        ('{"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 1}]}', None),
    ],
)
def test_it_is_named_by_its_path(text: str, path: str | None) -> None:
    assert given_twice(text.encode()) == path


@given(JSON)
def test_what_has_none_has_none(value: object) -> None:
    assert given_twice(json.dumps(value).encode()) is None
