"""Whatever comes from a network is a record or a typed error (the fuzzer itself: tests/kv_transfer/fuzz.py)."""

from __future__ import annotations

import msgpack
import pytest

from cluster.rpc.channels import MAX_MESSAGE_BYTES
from engine.errors import InvalidRequest, TransferFailed
from kv_transfer.carriers.grpc import _unpack
from kv_transfer.frames import HEADER_BYTES, Commit, decode_places, encode
from kv_transfer.handoff import HandOff
from tests.kv_transfer.fakes import handoff_of
from tests.kv_transfer.fuzz import TARGETS, Target, fuzz, outcome_of

NUM_INPUTS = 400_000  # about 15 s on a slow core


@pytest.mark.slow
def test_mutated_records_are_taken_as_what_they_are_or_refused_by_a_typed_error() -> None:
    report = fuzz(NUM_INPUTS, seed=5)
    assert not report.faults, str(report)
    assert report.num_inputs == NUM_INPUTS
    for name in TARGETS:
        assert report.outcomes[name, "taken"] > NUM_INPUTS / 100, "mutations that are never taken reach nothing"
        assert sum(target == name for target, _ in report.outcomes) > 3


@pytest.mark.parametrize("name", TARGETS)
def test_golden_records_are_taken(name: str) -> None:
    assert [outcome_of(TARGETS[name], data) for data in TARGETS[name].golden] == [("taken", "")] * len(
        TARGETS[name].golden
    )


def test_the_fuzzer_sees_a_crash_and_a_record_that_changes() -> None:
    assert outcome_of(Target([], lambda data: (data, data[1:])), b"ab")[1]
    assert outcome_of(Target([], lambda data: (data[5:6], data[9].to_bytes())), b"ab")[1]


def test_a_message_full_of_small_records_is_read_once_not_over_and_over() -> None:
    """Copying the rest at each of them would copy 200 GB."""
    data = encode(Commit(0, 0, b"")) * (MAX_MESSAGE_BYTES // HEADER_BYTES)
    assert len(decode_places(data)) == MAX_MESSAGE_BYTES // HEADER_BYTES


def test_a_hand_off_with_a_number_that_nobody_can_send_on_is_refused() -> None:
    version, parts = msgpack.unpackb(handoff_of(5).encode())
    changed = [[name, required, "9" * 40 if name == "epoch" else value] for name, required, value in parts]
    with pytest.raises(TransferFailed, match="malformed"):
        HandOff.decode(msgpack.packb([version, changed]) or b"")


def test_a_hand_off_whose_version_is_too_deep_to_be_told_is_refused() -> None:
    depths = range(100, 1000, 20)
    for depth in depths:
        with pytest.raises(TransferFailed):
            HandOff.decode(b"\x92" + b"\x91" * depth + b"\x00\x90")


@pytest.mark.parametrize("changes", [{0: b"r"}, {1: "3"}, {1: 1.5}, {6: 7}], ids=str)
def test_a_lease_record_with_a_value_of_another_type_is_refused(changes: dict[int, object]) -> None:
    row = ["r", 3, "p0", "i1", "a:1", "cohort", "secret"]
    assert _unpack(msgpack.packb([[row], 0, []]) or b"")[0][0].secret == "secret"
    for at, value in changes.items():
        row[at] = value
    with pytest.raises(InvalidRequest):
        _unpack(msgpack.packb([[row], 0, []]) or b"")
