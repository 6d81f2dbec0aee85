"""Clusters of fake parts on a real Ray, as users run them: a command of its own that is watched from outside."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.guard import processes_of
from cluster.ray_session import guarded_directory, local_ray_environment

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 2
READY_S = 60.0
LEASE_S = 3.0


class Command:
    """`steelyard serve` with fake parts, in a process group of its own as a shell would start it."""

    def __init__(self, folder: Path, environment: dict[str, str], yaml: str = "") -> None:
        config = folder / "cluster.yaml"
        config.write_text(f"cluster: {{driver_lease_s: {LEASE_S}, start_timeout_s: 40.0}}\nrouter: {{port: 0}}\n{yaml}")
        self._output = folder / f"output-{time.monotonic_ns()}.txt"
        self._url = ""
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster.fakes", str(config)],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until_ready(self) -> None:
        until(lambda: "Ready after" in self.output or self.process.poll() is not None, READY_S, self.describe)
        found = re.search(r"URL +(http://\S+)/v1", self.output)
        assert found, self.output
        self._url = found.group(1)

    def health(self) -> dict:
        """What the fake gateway says of itself and of the workers that it was told of."""
        return httpx.get(f"{self._url}/health", timeout=5.0, trust_env=False).json()

    def members(self) -> dict[str, dict]:
        try:
            return {member["worker_id"]: member for member in self.health()["members"]}
        except httpx.HTTPError:  # the gateway is being replaced
            return {}

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(30)

    def describe(self) -> str:
        return self.output


def until(condition: Callable[[], bool], limit_s: float, describe: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)


def is_alive(pid: int | str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def session_directory(command: Command) -> str:
    """Where a command's local Ray lives: it names it to all its children."""
    for child in children_of(command.process.pid):
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in environment:
            if variable.startswith(b"STEELYARD_RAY_DIR="):
                return variable.partition(b"=")[2].decode()
    raise AssertionError("no child of the command belongs to a local Ray")


def actor_pid(directory: str, kind: str) -> int:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(directory)}
    return next(pid for pid, title in titles.items() if title.startswith(f"ray::{kind}".encode()))


def assert_nothing_left(directory: str, limit_s: float = 5.0) -> None:
    until(lambda: not Path(directory).exists(), limit_s, lambda: f"{directory} is still there")
    left = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in processes_of(directory)}
    assert not left
    assert not [name for name in os.listdir("/dev/shm") if "plasma" in name or "steelyard" in name]


@pytest.fixture
def plain_environment() -> dict[str, str]:
    """As on a fresh machine: nothing chosen about Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STEELYARD_"))}


# --- a local Ray ----------------------------------------------------------------------------------------------


def test_whatever_dies_is_replaced_and_ctrl_c_leaves_nothing(tmp_path: Path, plain_environment: dict[str, str]) -> None:
    environment = plain_environment | {"HOME": str(tmp_path)}
    command = Command(tmp_path, environment)
    try:
        command.wait_until_ready()
        directory = session_directory(command)
        before = command.members()
        assert sorted(before) == ["decode-0", "prefill-0"]
        assert all(member["address"].startswith("127.0.0.1:") for member in before.values())

        for worker_id in before:
            _kill_worker(command, worker_id)

        old_gateway = command.health()["pid"]
        os.kill(old_gateway, signal.SIGKILL)
        until(lambda: len(command.members()) == 2 and command.health()["pid"] != old_gateway, 15, command.describe)

        _kill_supervisor(command, directory)
        assert command.interrupt() == 0, command.output
        assert_nothing_left(directory)
        assert "Traceback" not in command.output
        assert not (tmp_path / ".ray").exists(), "Ray wrote a token into the user's home"
    finally:
        command.process.kill()


def _kill_worker(command: Command, worker_id: str) -> None:
    before, last_version = command.members()[worker_id], command.health()["versions"][-1]
    os.kill(int(before["cohort"]), signal.SIGKILL)

    def is_replaced() -> bool:
        now = command.members().get(worker_id)
        return now is not None and now["incarnation"] != before["incarnation"]

    until(is_replaced, 15, command.describe)
    versions = command.health()["versions"]
    assert versions == sorted(set(versions))
    assert versions[-1] == last_version + 2, "one version without the worker, one with it again"


def _kill_supervisor(command: Command, directory: str) -> None:
    """Its successor adopts the living workers and goes above the gateway's version."""
    before, last_version, old = command.members(), command.health()["versions"][-1], actor_pid(directory, "SupervisorActor")
    os.kill(old, signal.SIGKILL)
    until(lambda: command.health()["versions"][-1] > last_version, 20, command.describe)
    assert command.members() == before
    assert command.process.poll() is None


def test_a_killed_command_takes_its_ray_with_it(tmp_path: Path, plain_environment: dict[str, str]) -> None:
    command = Command(tmp_path, plain_environment)
    try:
        command.wait_until_ready()
        directory = session_directory(command)
        assert len(set(processes_of(directory))) > 5
    finally:
        command.process.kill()
    assert_nothing_left(directory, limit_s=10.0)


def test_a_worker_that_cannot_start_ends_the_command_with_its_reason(
    tmp_path: Path, plain_environment: dict[str, str]
) -> None:
    command = Command(tmp_path, plain_environment, yaml="model: {name: broken-weights}\n")
    try:
        assert command.process.wait(READY_S) == 1
        assert "error: layer 3 of model.safetensors is missing" in command.output
        assert "Traceback" not in command.output
    finally:
        command.process.kill()


def test_a_port_in_use_is_named(tmp_path: Path, plain_environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = Command(tmp_path, plain_environment)
        command.process.kill()
        config = tmp_path / "taken.yaml"
        config.write_text(f"router: {{port: {port}}}\n")
        done = subprocess.run(
            [sys.executable, "-m", "tests.cluster.fakes", str(config)],
            **{"cwd": ROOT, "env": plain_environment, "capture_output": True, "text": True, "timeout": READY_S},
        )
    assert done.returncode == 2
    assert f"error: router.port: {port} is in use" in done.stderr
