"""Targets: from headers, else from the class, else from the config; a wrong header is refused by its name."""

from __future__ import annotations

import math

import pytest

from engine.errors import InvalidRequest
from engine.types import Request, SamplingParams, Service
from router.config import RouterConfig
from router.targets import with_targets
from router.tenants import Tenant
from tests.router.fakes import CHAT, FakeGenerator, chat, make_client

REQUEST = Request("r", (1, 2, 3), SamplingParams(), timeout_s=600.0, service=Service(tenant="t"))


def targets(headers: dict[str, str] | None = None, since_s: float = 0.0, **config: object) -> tuple[Service, float]:
    request = with_targets(REQUEST, headers or {}, RouterConfig.model_validate(config), since_s)
    return request.service, request.timeout_s


def test_who_names_nothing_anywhere_is_promised_nothing_but_the_deadline() -> None:
    assert targets() == (Service("t", 0, math.inf, math.inf), 600.0)


def test_the_config_says_what_is_promised_to_who_names_nothing() -> None:
    assert targets(ttft_s=2.0, tpot_s=0.1) == (Service("t", 0, 2.0, 0.1), 600.0)


def test_a_class_goes_before_the_config_and_a_header_before_the_class() -> None:
    config = {"ttft_s": 9.0, "tpot_s": 9.0, "classes": {"fast": {"ttft_s": 0.5, "tpot_s": 0.05, "priority": 2}}}
    assert targets({"x-slo-class": "fast"}, **config)[0] == Service("t", 2, 0.5, 0.05)
    headers = {"x-slo-class": "fast", "x-slo-ttft-ms": "250", "x-slo-tpot-ms": "12.5"}
    assert targets(headers, **config)[0] == Service("t", 2, 0.25, 0.0125)


def test_best_effort_is_a_class_without_targets_whatever_the_config_says() -> None:
    assert targets({"x-slo-class": "batch"}, ttft_s=2.0)[0] == Service("t", 10, math.inf, math.inf)


def test_the_time_since_the_arrival_counts() -> None:
    assert targets({"x-slo-ttft-ms": "1000", "x-deadline-ms": "3000"}, since_s=0.25) == (
        Service("t", 0, 0.75, math.inf),
        2.75,
    )


def test_a_deadline_is_never_later_than_the_config_has_it() -> None:
    assert targets({"x-deadline-ms": "900000"})[1] == 600.0


@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-deadline-ms"])
@pytest.mark.parametrize("text", ["", "soon", "0", "-5", "nan", "inf", "1e99"])
def test_what_is_no_time_is_refused_by_the_headers_name(header: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=header) as caught:
        targets({header: text})
    assert caught.value.param == header


def test_an_unknown_class_is_refused_and_told_which_there_are() -> None:
    with pytest.raises(InvalidRequest, match="batch, interactive, standard") as caught:
        targets({"x-slo-class": "gold"})
    assert caught.value.param == "x-slo-class"


async def test_headers_of_a_request_reach_the_one_who_places_it() -> None:
    generator = FakeGenerator()
    async with make_client(generator) as client:
        headers = {"x-slo-ttft-ms": "60000", "x-slo-class": "batch"}
        assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200
    (request,) = generator.requests
    assert 0 < request.service.ttft_s <= 60.0 and request.service.priority == 10


async def test_a_wrong_header_is_bad_input() -> None:
    async with make_client(FakeGenerator()) as client:
        response = await client.post(CHAT, json=chat(), headers={"x-slo-tpot-ms": "quick"})
    assert response.status_code == 400 and response.json()["error"]["param"] == "x-slo-tpot-ms"


GOLD = Tenant(name="gold", slo_class="fast", allowed_classes=("batch",))
FAST = {"classes": {"fast": {"ttft_s": 0.5, "priority": 2}, "batch": {"priority": 10}, "other": {}}}


def of_gold(headers: dict[str, str]) -> Service:
    return with_targets(REQUEST, headers, RouterConfig.model_validate(FAST), 0.0, GOLD).service


def test_a_tenant_s_class_holds_unless_the_request_names_another_that_it_may_use() -> None:
    assert of_gold({}) == Service("t", 2, 0.5, math.inf) == of_gold({"x-slo-class": "fast"})
    assert of_gold({"x-slo-class": "batch"}) == Service("t", 10, math.inf, math.inf)
    assert of_gold({"x-slo-ttft-ms": "250"}) == Service("t", 2, 0.25, math.inf)
    with pytest.raises(InvalidRequest, match="may not use 'other'") as caught:
        of_gold({"x-slo-class": "other"})
    assert caught.value.param == "x-slo-class"
