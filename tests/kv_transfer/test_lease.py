from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import ValidationError

from engine.types import Key
from kv_transfer.config import TransferConfig
from kv_transfer.lease import Lease

LEASE = Lease(Key("r", 3), "p0", "i1", "127.0.0.1:1", "cohort", "secret")


def test_a_lease_matches_itself() -> None:
    assert LEASE.matches(replace(LEASE))


@pytest.mark.parametrize(
    "change",
    [
        {"secret": "Secret"}, {"secret": ""}, {"secret": "secret0"}, {"secret": "sécret"}, {"key": Key("r", 2)},
        {"key": Key("s", 3)}, {"incarnation": "i2"}, {"cohort": "another"},
    ],
)  # fmt: skip
def test_a_lease_with_another_secret_request_epoch_incarnation_or_cohort_does_not_match(change: dict) -> None:
    assert not LEASE.matches(replace(LEASE, **change))
    assert not replace(LEASE, **change).matches(LEASE)


def test_a_lease_survives_that_the_producer_has_several_addresses() -> None:
    assert LEASE.matches(replace(LEASE, address="10.0.0.1:1"))


def test_heartbeats_so_rare_that_one_lost_ends_the_lease_are_refused() -> None:
    with pytest.raises(ValidationError, match="heartbeat_s"):
        TransferConfig(lease_ttl_s=10.0, heartbeat_s=5.0)
