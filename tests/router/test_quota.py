"""What a tenant may use, over a clock that stands where the test puts it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest, Overloaded
from router.quota import Quota
from router.tenants import Limits


def test_a_refused_request_is_admitted_after_the_time_it_was_told() -> None:
    quota = Quota(Limits(requests_per_minute=2), now_s=0.0)
    quota.admit("a", 5, 0.0)
    quota.admit("b", 5, 0.0)
    with pytest.raises(Overloaded) as refused:
        quota.admit("c", 5, 0.0)
    assert refused.value.retry_after_s == pytest.approx(30.0)
    with pytest.raises(Overloaded):
        quota.admit("c", 5, 29.0)
    quota.admit("c", 5, 30.0)


def test_generated_tokens_make_a_debt_that_has_to_be_paid_first() -> None:
    quota = Quota(Limits(tokens_per_minute=60), now_s=0.0)
    quota.admit("a", 10, 0.0)
    quota.charge(70, 0.0)
    with pytest.raises(Overloaded) as refused:
        quota.admit("b", 10, 0.0)
    assert refused.value.retry_after_s == pytest.approx(30.0)


def test_a_refusal_charges_nothing() -> None:
    quota = Quota(Limits(requests_per_minute=60, tokens_per_minute=60), now_s=0.0)
    quota.admit("a", 50, 0.0)
    before = quota.headers(0.0)
    with pytest.raises(Overloaded):
        quota.admit("b", 20, 0.0)
    assert quota.headers(0.0) == before
    assert quota.num_live == 1


def test_a_prompt_that_never_fits_is_told_so() -> None:
    with pytest.raises(InvalidRequest):
        Quota(Limits(tokens_per_minute=60), now_s=0.0).admit("a", 61, 0.0)


def test_a_live_request_makes_room_when_it_leaves() -> None:
    quota = Quota(Limits(max_live_requests=1), now_s=0.0)
    quota.admit("a", 1, 0.0)
    with pytest.raises(Overloaded):
        quota.admit("b", 1, 0.0)
    quota.leave("a")
    quota.leave("a")
    quota.admit("b", 1, 0.0)


def test_two_gateways_have_half_each() -> None:
    half = Quota(Limits(requests_per_minute=60, tokens_per_minute=600), now_s=0.0, num_gateways=2)
    assert half.headers(0.0)["x-ratelimit-limit-requests"] == "30"
    assert half.headers(0.0)["x-ratelimit-limit-tokens"] == "300"


@given(st.integers(1, 100), st.lists(st.floats(0, 30), max_size=60))
def test_nobody_gets_more_than_a_full_bucket_and_what_has_filled_since(per_minute: int, gaps_s: list[float]) -> None:
    quota, now_s, num_admitted = Quota(Limits(requests_per_minute=per_minute), now_s=0.0), 0.0, 0
    for gap_s in gaps_s:
        now_s += gap_s
        try:
            quota.admit(object(), 1, now_s)
        except Overloaded:
            continue
        num_admitted += 1
    assert num_admitted <= per_minute + per_minute * now_s / 60 + 1e-6
