"""Schemathesis against our own OpenAPI document: requests that fit it and requests that do not, and what comes of them.

    python -m tests.router.schemathesis_run --cases 10000             # the app in this process, with a fake generator
    python -m tests.router.schemathesis_run --cases 1000 --url http://127.0.0.1:8000     # a cluster that serves

Each operation gets its share of the cases, half of them valid and half not, made by Hypothesis from one seed. A case
fails when it gets a 5xx, or an answer whose status, content type, headers or body the document does not have.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Err, Result
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.router.fakes import FakeGenerator, make_app

SEED = 20261125
BODY_WEIGHT = 8  # of an operation that has a body, beside one that has none
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@dataclass(slots=True)
class Findings:
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)  # by operation
    faults: dict[str, str] = field(default_factory=dict)  # the last of each kind and operation

    @property
    def num_cases(self) -> int:
        return sum(self.statuses.values())


def run(schema: schemathesis.BaseSchema, num_cases: int) -> Findings:
    """All operations of the document, with about this many cases in all."""
    found = Findings()
    operations = [_known(result) for result in schema.get_all_operations()]
    weights = [BODY_WEIGHT if operation.body else 1 for operation in operations]
    for operation, weight in zip(operations, weights, strict=True):
        for mode in GenerationMode:
            _try(operation, mode, max(1, num_cases * weight // sum(weights) // 2), found)
    return found


def _known(result: Result[APIOperation, InvalidSchema]) -> APIOperation:
    if isinstance(result, Err):
        raise result.err()
    return result.ok()


def _try(operation: APIOperation, mode: GenerationMode, num_cases: int, found: Findings) -> None:
    """Hypothesis makes fewer where there are no more different ones; where all texts are valid, none is not."""

    @seed(SEED)
    @settings(
        max_examples=num_cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        response = case.call()
        found.statuses[operation.label, response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for fault in group.exceptions:
                found.faults[f"{operation.label}: {fault.title}"] = f"{fault.message}\n{case.as_curl_command()}"

    try:
        one()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE and not operation.body, f"{operation.label} cannot be asked"


def local_schema(generator: FakeGenerator | None = None) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", make_app(generator or FakeGenerator()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--url", help="of a gateway; without it, the app in this process")
    asked = parser.parse_args(arguments)
    schema = schemathesis.openapi.from_url(f"{asked.url}/openapi.json") if asked.url else local_schema()
    began_s = time.monotonic()
    found = run(schema, asked.cases)
    for line in report(found):
        print(line)
    print(f"{found.num_cases} cases in {time.monotonic() - began_s:.0f} s: {len(found.faults)} kinds of faults")
    return 1 if found.faults else 0


def report(found: Findings) -> Iterator[str]:
    for (label, status), number in sorted(found.statuses.items()):
        yield f"{label:40} {status} {number:6}"
    for kind, words in found.faults.items():
        yield f"FAULT {kind}\n{words}"


if __name__ == "__main__":
    raise SystemExit(main())
