"""Loss: an nftables rule that drops one packet in so many at random, where it enters (`numgen random`).

`python tests/faults/loss.py DEVICE ONE_IN` sets it in the network namespace of the process, and exits with 77 where the
kernel has no such rules. The kernel is told over netlink, as the `nft` tool would, which is often not installed:
    table netdev loss { chain in { type filter hook ingress device DEVICE priority 0;
        numgen random mod ONE_IN == 0 drop } }
See include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

UNSUPPORTED = 77  # exit status
_NETFILTER = 12  # of AF_NETLINK's protocols
_NETDEV = 5  # family
_NFTABLES = 10  # netfilter's part
_BEGIN, _END = 0x10, 0x11
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = (_NFTABLES << 8 | kind for kind in (0, 3, 6))
_REQUEST, _ACK, _CREATE, _APPEND = 1, 4, 0x400, 0x800
_NESTED = 0x8000
_RANDOM, _DROP, _EQUAL, _REGISTER, _VERDICT = 1, 0, 0, 1, 0


def _attribute(kind: int, value: bytes) -> bytes:
    size = 4 + len(value)
    return struct.pack("HH", size, kind) + value + bytes(-size % 4)


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(parts))


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _expression(name: str, *data: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *data))


def _message(number: int, kind: int, flags: int, family: int, part: int, body: bytes = b"") -> bytes:
    body = struct.pack(">BBH", family, 0, part) + body
    return struct.pack("IHHII", 16 + len(body), kind, flags, number, 0) + body


def rules(device: str, one_in: int) -> bytes:
    """All messages, in one transaction."""
    hook = _nested(4, _number(1, 0), _number(2, 0), _text(3, device))
    numbers = _expression("numgen", _number(1, _REGISTER), _number(2, one_in), _number(3, _RANDOM))
    is_zero = _expression("cmp", _number(1, _REGISTER), _number(2, _EQUAL), _nested(3, _attribute(1, bytes(4))))
    drop = _expression("immediate", _number(1, _VERDICT), _nested(2, _nested(2, _number(1, _DROP))))
    made = [
        (_NEW_TABLE, 0, _text(1, "loss")),
        (_NEW_CHAIN, 0, _text(1, "loss") + _text(3, "in") + hook + _text(7, "filter")),
        (_NEW_RULE, _APPEND, _text(1, "loss") + _text(2, "in") + _nested(4, numbers, is_zero, drop)),
    ]
    messages = [
        _message(number, kind, _REQUEST | _ACK | _CREATE | more, _NETDEV, 0, body)
        for number, (kind, more, body) in enumerate(made, 1)
    ]
    return b"".join([_message(0, _BEGIN, _REQUEST, 0, _NFTABLES), *messages, _message(4, _END, _REQUEST, 0, _NFTABLES)])


def apply(device: str, one_in: int) -> int:
    """Returns the kernel's first error, as errno, or 0."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as kernel:
        kernel.settimeout(5.0)
        kernel.bind((0, 0))
        kernel.send(rules(device, one_in))
        for _ in range(3):
            if error := -struct.unpack_from("i", kernel.recv(2**16), 16)[0]:
                return error
    return 0


if __name__ == "__main__":
    try:
        failed = apply(sys.argv[1], int(sys.argv[2]))
    except OSError as refused:
        failed = refused.errno or 1
    if failed:
        print(f"no loss can be set here: {os.strerror(failed)}", file=sys.stderr)
        sys.exit(UNSUPPORTED)
