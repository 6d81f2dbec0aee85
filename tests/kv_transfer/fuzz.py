"""Fuzzing of all that a transfer reads from a network: mutated golden records, by the millions.

1. a golden record of the target is drawn, or two are joined;
2. it is mutated where its structure is (header fields, lengths, msgpack values) or in any byte;
3. the target either takes it, and what it made says the same when it is encoded again, or raises a typed error.
Anything else is a fault, printed with the bytes. `python -m tests.kv_transfer.fuzz --inputs 10000000 [--seed n]`.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgpack

from engine.errors import SteelyardError
from engine.types import Key
from kv_transfer.carriers.distributed.service import pack_meeting, pack_wanted, unpack_meeting, unpack_wanted
from kv_transfer.carriers.grpc import _pack, _unpack
from kv_transfer.frames import HEADER_BYTES, Commit, Frame, FrameSpec, Place, decode, decode_places, encode
from kv_transfer.handoff import HandOff
from kv_transfer.lease import Lease
from tests.kv_transfer.fakes import handoff_of

MAX_INPUT_BYTES = 2**16
MAX_FAULTS = 10  # that are kept with their bytes
REPORT_EVERY = 100_000
FIELDS = ((4, "B"), (5, "B"), (6, "H"), (8, "H"), (10, "H"), (12, "I"), (16, "I"), (20, "I"), (24, "Q"), (32, "Q"))
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64 - 1, -(2**63), 0.5, 1e300, float("inf"), float("nan"), "", "x", "7",
    "9" * 40, "\x00", b"", b"\xff", [], [[]], [0], [None] * 9, {}, {"a": 1}, {b"a": 1}, [["a", True, 1]],
)  # fmt: skip
DEEP = b"\x91" * 900 + b"\x00"  # lists in lists


def _lease(name: str) -> Lease:
    return Lease(Key(name, 3), "p0", "i1", "127.0.0.1:1", "cohort", "secret")


FRAMES = [
    encode(Frame(7, FrameSpec(1, range(2, 4), range(5, 7)), b"payload!" * 4, 0x087FDEAE)),
    encode(Frame(0, FrameSpec(0, range(1), range(1)), b"", 0)),
    encode(Commit(8, 0x6412C991, handoff_of(5).encode())),
    encode(Place(9, FrameSpec(1, range(2, 4), range(5, 7)), (3, 70000), 8)),
    encode(Place(2**32 - 1, FrameSpec(0, range(3), range(40)), tuple(range(40)), 2**64 - 1)),
    encode(Place(9, FrameSpec(1, range(2, 4), range(5, 7)), (), 8, range(2**20, 2**20 + 512))),
]
PLACES = [*FRAMES[2:], b"".join(FRAMES[3:]), b"".join(FRAMES[3:] + FRAMES[2:3])]
SIBLING = handoff_of(5).request.sibling(Key("s", 0), 1, (8,))
HANDOFFS = [
    handoff_of(5).encode(),
    handoff_of(40).encode(),
    replace(handoff_of(5), siblings=(SIBLING,), stages=(("prefill", 0.5),), overlap_s=0.5).encode(),
]
REQUESTS = [
    _pack((_lease("r"),), 0),
    _pack((_lease("r"),), 5, (range(0, 2), range(7, 9))),
    _pack((_lease("r"), _lease("ü")), 2**32 - 1),
]
MEETINGS = [
    pack_meeting("0123456789abcdef", bytes(range(32)), 2**20, (("0/1", b"where"), ("0/2", b"\xff" * 170))),
    pack_meeting("f" * 16, b"t" * 32, 4096, ()),
]
WANTED = [pack_wanted("0123456789abcdef", 2**32 - 1), pack_wanted("f" * 16, 1) + REQUESTS[1]]


def _read_frame(data: bytes) -> tuple[bytes, bytes]:
    return data, encode(decode(data))


def _read_places(data: bytes) -> tuple[bytes, bytes]:
    return data, b"".join(map(encode, decode_places(data)))


def _read_handoff(data: bytes) -> tuple[bytes, bytes]:
    """Its parts may come in any order and with hints, so what is compared is a second way through."""
    once = HandOff.decode(data).encode()
    return once, HandOff.decode(once).encode()


def _read_request(data: bytes) -> tuple[bytes, bytes]:
    once = _pack(*_unpack(data))
    return once, _pack(*_unpack(once))


def _read_meeting(data: bytes) -> tuple[bytes, bytes]:
    once = pack_meeting(*unpack_meeting(data))
    return once, pack_meeting(*unpack_meeting(once))


def _read_wanted(data: bytes) -> tuple[bytes, bytes]:
    link, pull, rest = unpack_wanted(data)
    return data, pack_wanted(link, pull) + rest


@dataclass(frozen=True, slots=True)
class Target:
    """`read` returns two encodings that have to be the same."""

    golden: Sequence[bytes]
    read: Callable[[bytes], tuple[bytes, bytes]]
    is_msgpack: bool = False


TARGETS = {
    "decode": Target(FRAMES, _read_frame),
    "decode_places": Target(PLACES, _read_places),
    "HandOff.decode": Target(HANDOFFS, _read_handoff, is_msgpack=True),
    "_unpack": Target(REQUESTS, _read_request, is_msgpack=True),
    "unpack_meeting": Target(MEETINGS, _read_meeting, is_msgpack=True),
    "unpack_wanted": Target(WANTED, _read_wanted),
}


@dataclass(slots=True)
class Report:
    num_inputs: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    slowest_s: float = 0.0
    slowest: str = ""

    def __str__(self) -> str:
        lines = [f"{count:>10} {name}: {outcome}" for (name, outcome), count in sorted(self.outcomes.items())]
        lines += [f"fault: {fault}" for fault in self.faults]
        return "\n".join(lines) + (
            f"\n{self.num_inputs} inputs, {len(self.outcomes)} distinct outcomes, {self.num_faults} faults;"
            f" slowest input {self.slowest_s * 1e3:.1f} ms ({self.slowest}); most memory"
            f" {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB"
        )


def fuzz(num_inputs: int, seed: int, progress: Callable[[Report], None] | None = None) -> Report:
    """Ends early, with what it has, on Ctrl-C."""
    draw, report, names = random.Random(seed), Report(), list(TARGETS)
    try:
        for number in range(num_inputs):
            _try(report, names[number % len(names)], draw)
            if progress is not None and report.num_inputs % REPORT_EVERY == 0:
                progress(report)
    except KeyboardInterrupt:
        pass
    return report


def _try(report: Report, name: str, draw: random.Random) -> None:
    target = TARGETS[name]
    data = mutated(target, draw)
    begun = time.perf_counter()
    outcome, fault = outcome_of(target, data)
    taken_s = time.perf_counter() - begun
    report.num_inputs += 1
    report.outcomes[name, outcome] += 1
    if taken_s > report.slowest_s:
        report.slowest_s, report.slowest = taken_s, f"{name}, {len(data)} bytes"
    if fault:
        report.num_faults += 1
        if len(report.faults) < MAX_FAULTS:
            report.faults.append(f"{name}: {fault}: {data[:400].hex()}")


def outcome_of(target: Target, data: bytes) -> tuple[str, str]:
    """In short, and what is wrong with it (if so)."""
    try:
        first, second = target.read(data)
    except SteelyardError as error:
        cause = type(error.__cause__ or error.__context__).__name__
        words = re.sub(r"[^a-zA-Z -]", "", error.message).split()[:2]
        return f"{type(error).__name__}: {' '.join(words)} ({cause})", ""
    except Exception as error:  # whatever else comes is what we look for
        return type(error).__name__, f"{error!r:.200}"
    return ("taken", "") if first == second else ("taken for something else", "it does not encode to the same bytes")


# --- mutations -------------------------------------------------------------------------------------------------


def mutated(target: Target, draw: random.Random) -> bytes:
    data = draw.choice(target.golden)
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.random()
        if kind < 0.5:
            data = _values_changed(data, draw) if target.is_msgpack else _field_changed(data, draw)
        elif kind < 0.9:
            data = draw.choice(BYTEWISE)(data, draw)
        else:
            data = _joined(data, draw.choice(target.golden), draw)
    return data[:MAX_INPUT_BYTES]


def _field_changed(data: bytes, draw: random.Random) -> bytes:
    """Of one header, which begins where the magic is; or its length set right after the body was cut."""
    starts = [found.start() for found in re.finditer(b"SYF1", data) if found.start() + HEADER_BYTES <= len(data)]
    if not starts:
        return data
    start, wire = draw.choice(starts), bytearray(data)
    if draw.random() < 0.2:
        del wire[draw.randrange(start + HEADER_BYTES, len(wire) + 1) :]
        struct.pack_into("<Q", wire, start + 32, len(wire) - start - HEADER_BYTES)
        return bytes(wire)
    offset, code = draw.choice(FIELDS)
    size = struct.calcsize(code)
    value = draw.choice(NUMBERS) if draw.random() < 0.7 else draw.getrandbits(64)
    struct.pack_into("<" + code, wire, start + offset, value % 256**size)
    return bytes(wire)


def _values_changed(data: bytes, draw: random.Random) -> bytes:
    try:
        tree = [msgpack.unpackb(data, strict_map_key=False)]
        _change(tree, draw)
        packed = msgpack.packb(tree[0])
        return packed if isinstance(packed, bytes) else data
    except Exception:  # an earlier mutation left what msgpack cannot read or write
        return data


def _change(tree: list | dict, draw: random.Random) -> None:
    """One node at any depth: replaced, dropped, doubled, or changed in place with another."""
    while True:
        places = list(tree) if isinstance(tree, dict) else range(len(tree))
        at = draw.choice(places)
        if not (isinstance(tree[at], list | dict) and tree[at] and draw.random() < 0.8):
            break
        tree = tree[at]
    kind = draw.random()
    if kind < 0.7:
        tree[at] = draw.choice(VALUES)
    elif kind < 0.8:
        del tree[at]
    elif isinstance(tree, list):
        other = draw.randrange(len(tree))
        if kind < 0.9:
            tree.insert(other, tree[at])
        else:
            tree[at], tree[other] = tree[other], tree[at]
    else:
        tree[draw.choice(("", "unknown", b"bytes", 7))] = tree[at]


def _byte_set(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data)) if data else 0
    return data[:at] + bytes([draw.getrandbits(8)]) + data[at + 1 :]


def _bit_flipped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data)) if data else 0
    return data[:at] + bytes([byte ^ 1 << draw.randrange(8) for byte in data[at : at + 1]]) + data[at + 1 :]


def _truncated(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data) + 1)]


def _lengthened(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 60))


def _run_moved(data: bytes, draw: random.Random) -> bytes:
    """A run of bytes dropped, or put in again elsewhere."""
    first, last = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    at = draw.randrange(len(data) + 1)
    return data[:first] + data[last:] if draw.random() < 0.5 else data[:at] + data[first:last] + data[at:]


def _deepened(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + DEEP + data[at + 1 :]


BYTEWISE = (_byte_set, _byte_set, _bit_flipped, _bit_flipped, _truncated, _lengthened, _run_moved, _deepened)


def _joined(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data + other if draw.random() < 0.5 else data[: draw.randrange(len(data) + 1)] + other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.monotonic()

    def progress(report: Report) -> None:
        seconds = time.monotonic() - begun
        print(f"{report.num_inputs} inputs in {seconds:.0f} s, {report.num_faults} faults", flush=True)

    report = fuzz(options.inputs, options.seed, progress)
    print(f"{report}\nseed {options.seed}, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
