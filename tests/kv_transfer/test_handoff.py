from __future__ import annotations

import contextlib

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TransferFailed
from engine.types import Key, Request
from kv_transfer.handoff import HANDOFF_VERSION, HandOff
from tests.kv_transfer.fakes import handoff_of
from tests.strategies import SAMPLING_PARAMS, SERVICES

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
FLOATS = st.floats(allow_nan=False)
REQUESTS = st.builds(
    Request, st.text(), IDS.filter(len), SAMPLING_PARAMS, st.integers(0, 2**32 - 1), IDS, st.text(), FLOATS, SERVICES
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@st.composite
def handoffs(draw: st.DrawFn) -> HandOff:
    request = draw(REQUESTS)
    computed = draw(st.integers(0, request.num_tokens - 1))
    stages = draw(st.lists(st.tuples(st.text(), FLOATS), max_size=3).map(tuple))
    keys = st.builds(Key, st.text(), st.integers(0, 2**32 - 1))
    siblings = draw(st.lists(st.tuples(keys, st.integers(0, 2**31), IDS), max_size=3))
    found = tuple(request.sibling(*one) for one in siblings)
    usable = tuple(one for one in found if computed < one.num_tokens)
    return HandOff(request, computed, draw(st.integers(0, 2**31)), draw(st.text()), stages, usable, draw(FLOATS))


def parts_of(handoff: HandOff) -> list[list]:
    version, parts = msgpack.unpackb(handoff.encode())
    assert version == HANDOFF_VERSION
    return parts


def packed(parts: list[list], version: object = HANDOFF_VERSION) -> bytes:
    data = msgpack.packb([version, parts])
    assert isinstance(data, bytes)
    return data


def with_part(name: str, value: object) -> bytes:
    return packed([[part, required, value if part == name else old] for part, required, old in parts_of(handoff_of(5))])


@given(handoffs())
def test_a_hand_off_crosses_unchanged(handoff: HandOff) -> None:
    assert HandOff.decode(handoff.encode()) == handoff


def test_an_unknown_optional_part_is_dropped() -> None:
    handoff = handoff_of(5)
    assert HandOff.decode(packed([*parts_of(handoff), ["draft_state", False, b"hint"]])) == handoff


def test_an_unknown_required_part_is_refused_by_name() -> None:
    with pytest.raises(TransferFailed, match="grammar"):
        HandOff.decode(packed([*parts_of(handoff_of(5)), ["grammar", True, {}]]))


def test_an_optional_part_may_be_missing() -> None:
    handoff = handoff_of(5)
    assert HandOff.decode(packed([part for part in parts_of(handoff) if part[1]])) == handoff


@pytest.mark.parametrize("name", [part[0] for part in parts_of(handoff_of(5)) if part[1]])
def test_a_missing_required_part_is_refused(name: str) -> None:
    with pytest.raises(TransferFailed):
        HandOff.decode(packed([part for part in parts_of(handoff_of(5)) if part[0] != name]))


def test_an_unknown_sampling_parameter_is_refused_because_it_would_change_the_tokens() -> None:
    sampling = next(value for name, _, value in parts_of(handoff_of(5)) if name == "sampling")
    with pytest.raises(TransferFailed, match="mirostat_tau"):
        HandOff.decode(with_part("sampling", sampling | {"mirostat_tau": 1.0}))


@pytest.mark.parametrize("version", [0, HANDOFF_VERSION + 1, "1", None])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(TransferFailed, match="version"):
        HandOff.decode(packed(parts_of(handoff_of(5)), version))


@pytest.mark.parametrize("computed", [-1, 6, 2**40])
def test_more_computed_positions_than_tokens_are_refused(computed: int) -> None:
    with pytest.raises(TransferFailed):
        HandOff.decode(with_part("computed", computed))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_id", 5), ("epoch", "x"), ("prompt_ids", "abc"), ("prompt_ids", [1, None]), ("sampling", []),
        ("sampling", {"max_tokens": "many"}), ("computed", None), ("computed", "5"[:0]), ("usage", 3), ("usage", {}),
        ("gateway_id", 1), ("stages", [["a"]]), ("stages", [["a", "b"]]), ("timeout_s", []), ("namespace", None),
    ],
)  # fmt: skip
def test_a_part_of_a_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(TransferFailed):
        HandOff.decode(with_part(name, value))


@given(st.binary(max_size=200))
def test_junk_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(TransferFailed):
        HandOff.decode(data)


@given(handoffs(), st.data())
def test_damaged_records_raise_nothing_else(handoff: HandOff, data: st.DataObject) -> None:
    wire = bytearray(handoff.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(TransferFailed):
        assert isinstance(HandOff.decode(bytes(wire)), HandOff)


@given(st.sampled_from([part[0] for part in parts_of(handoff_of(5))]), JSON)
def test_a_part_of_any_value_is_taken_or_refused(name: str, value: object) -> None:
    with contextlib.suppress(TransferFailed):
        assert isinstance(HandOff.decode(with_part(name, value)), HandOff)
