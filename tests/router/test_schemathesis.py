"""A small part of what `python -m tests.router.schemathesis_run --cases 10000` does."""

from __future__ import annotations

import pytest

from engine.errors import SteelyardError
from tests.router.fakes import FakeGenerator, fail
from tests.router.schemathesis_run import local_schema, run

pytestmark = pytest.mark.slow


def test_no_request_gets_what_the_document_does_not_have() -> None:
    found = run(local_schema(), num_cases=300)
    assert found.faults == {}
    assert found.num_cases > 200
    for path in (
        "/v1/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    ):  # rules between chat's fields are many
        assert found.statuses[f"POST {path}", 200] and found.statuses[f"POST {path}", 400], found.statuses


def test_an_answer_of_500_would_be_found() -> None:
    broken = FakeGenerator(fail(SteelyardError("a planted fault")))
    found = run(local_schema(broken).include(path="/v1/completions"), num_cases=10)
    assert any("Server error" in kind for kind in found.faults), found
