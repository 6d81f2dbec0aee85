"""Who may ask: keys files, what is shown as a key, and what a tenant's requests become."""

from __future__ import annotations

import contextlib
import logging

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from router.config import RouterConfig
from router.gateway import create_app
from router.step_history import StepHistory
from router.tenants import KeyRing, Limits, Tenant, hash_of, parse_tenants, ring_of
from tests.router.fakes import COMPLETIONS, FakeGenerator, completion, text_model

KEY, OTHER = "sk-of-the-first", "sk-of-the-other"


def ring(limits: Limits | None = None, enabled: bool = True) -> KeyRing:
    first = Tenant(name="first", keys=(hash_of(KEY),), priority=3, limits=limits or Limits(), enabled=enabled)
    return ring_of((first, Tenant(name="other", keys=(hash_of(OTHER),))))


def client(generator: FakeGenerator, keys: KeyRing | None) -> httpx.AsyncClient:
    app = create_app(
        generator, text_model(), RouterConfig(), steps=StepHistory(), wall_clock=lambda: 0.0, keys=lambda: keys
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer ")],
        [("authorization", f"Basic {KEY}")],
        [("authorization", f"Bearer {KEY}x")],
        [("authorization", "Bearer " + "x" * 60_000)],
        [("authorization", b"Bearer \xff\xfe")],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {OTHER}")],
        [("authorization", f"Bearer {KEY}"), ("x-api-key", OTHER)],
    ],
)
async def test_whoever_shows_no_valid_key_is_refused_in_openais_words(headers: list, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    generator = FakeGenerator()
    async with client(generator, ring()) as http:
        reply = await http.post(f"{COMPLETIONS}?api_key={KEY}", json=completion(), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert generator.requests == []
    assert KEY not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("router"))


@pytest.mark.parametrize("headers", [bearer(KEY), {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
async def test_requests_are_their_tenants(headers: dict[str, str]) -> None:
    generator = FakeGenerator()
    async with client(generator, ring()) as http:
        assert (await http.post(COMPLETIONS, json=completion(), headers=headers)).status_code == 200
        assert (await http.post(COMPLETIONS, json=completion(), headers=bearer(OTHER))).status_code == 200
    mine, theirs = generator.requests
    assert (mine.service.tenant, mine.service.priority, theirs.service.tenant) == ("first", 3, "other")
    assert mine.prompt_ids == theirs.prompt_ids
    assert mine.namespace != theirs.namespace


async def test_a_disabled_tenant_is_refused_and_open_routes_ask_for_no_key() -> None:
    async with client(FakeGenerator(), ring(enabled=False)) as http:
        assert (await http.post(COMPLETIONS, json=completion(), headers=bearer(KEY))).status_code == 403
        assert [(await http.get(path)).status_code for path in ("/health", "/metrics", "/version")] == [200] * 3
        assert (await http.get("/v1/models")).status_code == 401


async def test_without_keys_everyone_is_nobody() -> None:
    generator = FakeGenerator()
    async with client(generator, None) as http:
        assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
    assert (generator.requests[0].service.tenant, generator.requests[0].namespace) == ("", "")


async def test_limits_hold_and_are_told() -> None:
    generator = FakeGenerator()
    limits = Limits(requests_per_minute=1, max_prompt_tokens=20, max_tokens=50, max_body_bytes=200)
    async with client(generator, ring(limits)) as http:
        bad = [completion("x" * 21, max_tokens=5), completion(max_tokens=51), completion(max_tokens=26, n=2)]
        replies = [await http.post(COMPLETIONS, json=one, headers=bearer(KEY)) for one in bad]
        assert [reply.status_code for reply in replies] == [400] * 3
        large = await http.post(COMPLETIONS, json=completion("x" * 300), headers=bearer(KEY))
        assert large.status_code == 413
        served = await http.post(COMPLETIONS, json=completion(max_tokens=5), headers=bearer(KEY))
        assert (served.status_code, served.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        refused = await http.post(COMPLETIONS, json=completion(max_tokens=5), headers=bearer(KEY))
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert len(generator.requests) == 1


def test_of_many_keys_each_finds_its_tenant() -> None:
    tenants = [Tenant(name=f"t{index}", keys=(hash_of(f"sk-{index}"),)) for index in range(300)]
    found = [ring_of(tenants).find(f"sk-{index}".encode()) for index in (0, 150, 299, 300)]
    assert [one and one.name for one in found] == ["t0", "t150", "t299", None]


@pytest.mark.parametrize(
    "text",
    [
        "tenants: [{name: a, keys: [sk-pasted-as-it-is]}]",
        "tenants: [{name: a, kees: []}]",
        "tenants: [{name: a}, {name: a}]",
        f"tenants: [{{name: a, keys: ['{hash_of(KEY)}', '{hash_of(KEY)}']}}]",
        "tenants: [{name: 'a\\nb'}]",
        "{",
        "[]",
    ],
)
def test_a_broken_file_is_refused_and_shows_nothing_of_its_keys(text: str) -> None:
    with pytest.raises(ConfigError, match=r"router\.keys_file") as error:
        ring_of(parse_tenants(text))
    assert "pasted" not in error.value.message


@given(st.text(max_size=60))
def test_any_text_is_a_ring_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert ring_of(parse_tenants(text)).find(b"sk-x") is None
