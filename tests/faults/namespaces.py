"""Two network namespaces, joined by a link that can be cut, slowed and made lossy.

    this process == a :: link :: b == this process

Each has an address that this process reaches by a pair of devices of its own, so that only what goes from worker to
worker crosses the link. All names have this process's id in them, and all goes in the end; nothing else of the host is
touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.loss import UNSUPPORTED

LOSS = Path(__file__).with_name("loss.py")


class NotHere(Exception):
    """Why this machine cannot do it."""


@dataclass(frozen=True, slots=True)
class Place:
    """One namespace. `address`: where others reach it; `link`: its end of the link."""

    name: str
    address: str
    link: str
    link_address: str

    @property
    def enter(self) -> tuple[str, ...]:
        """Before a command that is to run there."""
        return ("ip", "netns", "exec", self.name)


@dataclass(frozen=True, slots=True)
class Joined:
    a: Place
    b: Place

    def cut(self) -> None:
        """At b's end: there it shows at once, at a's end packets vanish."""
        _run("ip", "-n", self.b.name, "link", "set", self.b.link, "down")

    def join(self) -> None:
        """Bring the link up; each one's address is reached over it."""
        for here, there in ((self.a, self.b), (self.b, self.a)):
            _run("ip", "-n", here.name, "link", "set", here.link, "up")
            route = (there.address, "via", there.link_address, "src", here.address)
            _run("ip", "-n", here.name, "route", "replace", *route)

    def slow(self, rate: str) -> None:
        """From a to b, so many bits per second, as tc writes them. Raises NotHere."""
        bucket = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        try:
            _run("tc", "-n", self.a.name, "qdisc", "replace", "dev", self.a.link, "root", *bucket)
        except subprocess.CalledProcessError as error:
            raise NotHere(f"tc cannot set a tbf: {error.stderr.strip()}") from None

    def fast(self) -> None:
        _run("tc", "-n", self.a.name, "qdisc", "del", "dev", self.a.link, "root")

    def lose(self, one_in: int) -> None:
        """Of what comes to b, one packet in so many at random. Raises NotHere."""
        done = _tried(*self.b.enter, sys.executable, str(LOSS), self.b.link, str(one_in))
        if done.returncode == UNSUPPORTED:
            raise NotHere(done.stderr.strip())
        done.check_returncode()

    def num_sent_bytes(self) -> int:
        """From a to b."""
        return int(_run(*self.a.enter, "cat", f"/sys/class/net/{self.a.link}/statistics/tx_bytes"))

    def num_retransmitted(self) -> int:
        """Segments that a's TCP had to send again."""
        names, values = (
            line.split()
            for line in _run(*self.a.enter, "cat", "/proc/net/snmp").splitlines()
            if line.startswith("Tcp:")
        )
        return int(values[names.index("RetransSegs")])


@contextmanager
def namespaces() -> Iterator[Joined]:
    """Raises NotHere."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        raise NotHere("network namespaces need root, ip and tc")
    number, net = os.getpid(), f"10.213.{os.getpid() % 256}"
    a, b = (
        Place(f"sy{number}{name}", f"{net}.{4 * index + 2}", f"sy{number}l{name}", f"{net}.{9 + index}")
        for index, name in enumerate("ab")
    )
    try:
        try:
            _make(a, b, net)
        except subprocess.CalledProcessError as error:
            raise NotHere(f"no namespaces can be joined here: {error.cmd}: {error.stderr.strip()}") from None
        yield Joined(a, b)
    finally:
        for place in (a, b):
            _tried("ip", "netns", "del", place.name)  # and with it all its devices, and their other ends


def _make(a: Place, b: Place, net: str) -> None:
    for index, place in enumerate((a, b)):
        _run("ip", "netns", "add", place.name)
        ours, theirs = f"{place.name}0", f"{place.name}1"
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", place.name)
        _run("ip", "addr", "add", f"{net}.{4 * index + 1}/30", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        _run("ip", "-n", place.name, "addr", "add", f"{place.address}/30", "dev", theirs)
        for device in ("lo", theirs):
            _run("ip", "-n", place.name, "link", "set", device, "up")
    _run("ip", "-n", a.name, "link", "add", a.link, "type", "veth", "peer", "name", b.link, "netns", b.name)
    for place in (a, b):
        _run("ip", "-n", place.name, "addr", "add", f"{place.link_address}/30", "dev", place.link)
    joined = Joined(a, b)
    joined.join()
    joined.slow("1gbit")  # whether it can be
    joined.fast()


def _tried(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def _run(*command: str) -> str:
    done = _tried(*command)
    done.check_returncode()
    return done.stdout
