"""The OpenAPI document and the page made of it."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from router.docs_page import docs_page
from router.gateway import BODIES
from tests.router.fakes import MODEL, FakeGenerator, chat, completion, make_app, make_client

METHODS = {"get", "post", "delete"}


@pytest.fixture
def document() -> dict[str, Any]:
    return make_app(FakeGenerator()).openapi()


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert isinstance(node, dict)


def test_every_route_tells_its_answers_and_none_that_it_does_not_give(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        assert set(operations) <= METHODS
        for operation in operations.values():
            statuses = set(operation["responses"])
            assert {"200", "431", "500", "503"} <= statuses and "422" not in statuses, path
            assert ("requestBody" in operation) == ({"400", "408", "413"} <= statuses), path
            assert all("x-request-id" in response["headers"] for response in operation["responses"].values())


def test_generating_routes_tell_the_headers_that_they_read(document: dict[str, Any]) -> None:
    read = {"x-slo-ttft-ms", "x-slo-tpot-ms", "x-deadline-ms", "x-slo-class", "x-timeline", "traceparent"}
    posts = {path: operations["post"] for path, operations in document["paths"].items() if "post" in operations}
    generating = {path for path, operation in posts.items() if "429" in operation["responses"]}
    assert generating == {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"}
    for path in generating:
        operation = posts[path]
        assert {one["name"] for one in operation["parameters"] if one["in"] == "header"} == read
        assert {"400", "401", "403", "413", "429"} <= set(operation["responses"])
        assert "Retry-After" in operation["responses"]["429"]["headers"]


async def test_headers_are_refused_as_they_are_told(document: dict[str, Any]) -> None:
    told = {one["name"]: one["schema"] for one in document["paths"]["/v1/completions"]["post"]["parameters"]}
    async with make_client(FakeGenerator()) as client:
        for name in ("x-slo-ttft-ms", "x-slo-tpot-ms", "x-deadline-ms"):
            for value in (0, 1, 86_400_000, 86_400_001):
                fits = Draft202012Validator(told[name]).is_valid(value)
                reply = await client.post("/v1/completions", json=completion(), headers={name: str(value)})
                assert reply.status_code == (200 if fits else 400), (name, value)


@pytest.mark.parametrize("body", BODIES)
def test_every_field_of_a_body_is_there(document: dict[str, Any], body: type[Any]) -> None:
    schema = document["components"]["schemas"][f"request.{body.__name__}"]
    assert set(schema["properties"]) == set(body.model_fields)
    assert schema["additionalProperties"] is False
    assert MODEL in schema["properties"]["model"]["enum"]


def test_bodies_that_are_taken_are_valid_and_unsupported_values_are_not(document: dict[str, Any]) -> None:
    def validator(name: str) -> Any:
        components = document["components"]
        return Draft202012Validator({"$ref": f"#/components/schemas/request.{name}", "components": components})

    chats, completions = validator("ChatBody"), validator("CompletionBody")
    assert chats.is_valid(chat(stop=["a"], logit_bias={"1": 2.5}, n=2, stream=True))
    assert completions.is_valid(completion([1, 2, 3], logprobs=5))
    assert not chats.is_valid(chat(audio={"voice": "alloy"}))
    assert not chats.is_valid(chat(n=129))
    assert not chats.is_valid(chat(colour="blue"))
    assert validator("ResponseBody").is_valid({"model": MODEL, "input": [{"role": "user", "content": "x"}]})
    assert not validator("ResponseBody").is_valid({"model": MODEL, "input": "x", "truncation": "auto"})


class _Page(HTMLParser):
    """Collects what a page would load, and what its tags are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset") or tag == "link"]


async def test_the_page_shows_all_routes_and_loads_nothing(document: dict[str, Any]) -> None:
    async with make_client(FakeGenerator()) as client:
        reply = await client.get("/docs")
        assert (await client.get("/openapi.json")).json() == document
        assert (await client.get("/redoc")).status_code == 404
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'")
    page = _Page()
    page.feed(reply.text)
    assert page.loads == [] and "script" not in page.tags
    assert all(f"<code>{path}</code>" in reply.text for path in document["paths"])
    assert all(f"<code>{name}</code>" in reply.text for name in BODIES[0].model_fields)


def test_the_page_escapes_what_it_shows(document: dict[str, Any]) -> None:
    document["info"]["title"] = "<script>alert(1)</script>"
    assert "<script>" not in docs_page(document)
