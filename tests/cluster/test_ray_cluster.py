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
from pathlib import Path

import httpx
import pytest

from cluster.guard import processes_of
from cluster.ray_session import guarded_directory

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 2
READY_S = 60.0
LEASE_S = 3.0


class Command:
    """`steelyard serve` with fake parts, in a process group of its own as a shell would start it."""

    def __init__(
        self, folder: Path, environment: dict[str, str], yaml: str = "", port: int = 0, gateways: int = 1
    ) -> None:
        config = folder / "cluster.yaml"
        router = f"router: {{port: {port}, gateways: {gateways}}}"
        config.write_text(f"cluster: {{driver_lease_s: {LEASE_S}}}\n{router}\n{yaml}")
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

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

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
    """Where a command's local Ray lives: its guard is told."""
    found: list[str] = []

    def is_guarded() -> bool:
        lines = [Path(f"/proc/{child}/cmdline").read_text().split("\0") for child in children_of(command.process.pid)]
        found.extend(line[4] for line in lines if line[3:] and line[3].endswith("guard.py"))
        return bool(found)

    until(is_guarded, READY_S, command.describe)
    return found[0]


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
    with Command(tmp_path, plain_environment | {"HOME": str(tmp_path)}) as command:
        command.wait_until_ready()
        directory = session_directory(command)
        before = command.members()
        assert sorted(before) == ["decode-0", "prefill-0"]
        assert all(member["address"].startswith("127.0.0.1:") for member in before.values())
        for worker_id in before:
            _kill_worker(command, worker_id)
        _kill_gateway(command)
        _kill_supervisor(command, directory)
        assert command.interrupt() == 0, command.output
        assert_nothing_left(directory)
        assert "Traceback" not in command.output
        assert not (tmp_path / ".ray").exists(), "Ray wrote a token into the user's home"


def test_two_gateways_share_a_port_and_one_that_is_killed_is_replaced(
    tmp_path: Path, plain_environment: dict[str, str]
) -> None:
    with Command(tmp_path, plain_environment | {"HOME": str(tmp_path)}, gateways=2) as command:
        command.wait_until_ready()
        directory = session_directory(command)
        until(lambda: len(gateways_of(command)) == 2, 20, command.describe)
        killed, kept = gateways_of(command)
        os.kill(killed, signal.SIGKILL)
        until(lambda: not is_alive(killed), 20)
        assert kept in gateways_of(command), "nobody is sent to the one that has gone"
        until(lambda: len(gateways_of(command)) == 2 and command.health()["num_gateways"] == 2, 20, command.describe)
        assert killed not in gateways_of(command) and kept in gateways_of(command)
        assert command.interrupt() == 0, command.output
        assert_nothing_left(directory)
        assert command.output.count("URL ") == 1 and "Traceback" not in command.output


def gateways_of(command: Command) -> list[int]:
    """The processes that answer, over many connections, and know both workers."""
    answers = [command.health() for _ in range(24)]
    return sorted({answer["pid"] for answer in answers if len(answer["members"]) == 2})


def _kill_worker(command: Command, worker_id: str) -> None:
    before, last_version = command.members()[worker_id], command.health()["versions"][-1]
    os.kill(int(before["cohort"]), signal.SIGKILL)

    def is_replaced() -> bool:
        now = command.members().get(worker_id)
        return now is not None and now["incarnation"] != before["incarnation"]

    until(is_replaced, 20, command.describe)
    versions = command.health()["versions"]
    assert versions == sorted(set(versions))
    assert versions[-1] == last_version + 2, "one version without the worker, one with it again"


def _kill_gateway(command: Command) -> None:
    """The next one listens on the same port, which the test goes on asking."""
    old = command.health()["pid"]
    os.kill(old, signal.SIGKILL)
    until(lambda: len(command.members()) == 2 and command.health()["pid"] != old, 20, command.describe)


def _kill_supervisor(command: Command, directory: str) -> None:
    """Its successor adopts the living workers and goes above the gateway's version."""
    before, last_version = command.members(), command.health()["versions"][-1]
    os.kill(actor_pid(directory, "SupervisorActor"), signal.SIGKILL)
    until(lambda: command.health()["versions"][-1] > last_version, 20, command.describe)
    assert command.members() == before
    assert command.process.poll() is None


SCALED = """
controller:
  {tick_s: 0.1, fewest: 5, window_s: 10, bucket_s: 1, together: false,
   scale: {max_workers: 5, add_after_s: 1, remove_after_s: 2, drain_s: 1}}
"""


def test_workers_come_and_leave_with_the_load_and_a_new_supervisor_knows_those_that_came(
    tmp_path: Path, plain_environment: dict[str, str]
) -> None:
    with Command(tmp_path, plain_environment | {"HOME": str(tmp_path)}, SCALED) as command:
        command.wait_until_ready()
        directory = session_directory(command)
        _load(command, 8.0)
        until(lambda: len(command.members()) == 5, 30, command.describe)
        came = command.members()
        assert len({member["cohort"] for member in came.values()}) == 5, "each is a process of its own"
        _kill_supervisor(command, directory)
        assert command.members() == came
        _load(command, 0.1)
        until(lambda: len(command.members()) == 2, 90, command.describe)
        pids = [int(member["cohort"]) for name, member in came.items() if name not in command.members()]
        until(lambda: not any(map(is_alive, pids)), 10, command.describe)
        assert "has left" in command.output
        _load(command, 8.0)
        until(lambda: len(command.members()) == 5, 90, command.describe)  # what they took was given back
        assert command.interrupt() == 0, command.output
        assert_nothing_left(directory)
        assert "Traceback" not in command.output


def _load(command: Command, rate: float) -> None:
    httpx.get(f"{command._url}/load/{rate}", timeout=5.0, trust_env=False)


def test_a_killed_command_takes_its_ray_with_it(tmp_path: Path, plain_environment: dict[str, str]) -> None:
    with Command(tmp_path, plain_environment) as command:
        command.wait_until_ready()
        directory = session_directory(command)
        assert len(set(processes_of(directory))) > 5
        command.kill()
        assert_nothing_left(directory)


def test_an_interrupted_start_leaves_nothing(tmp_path: Path, plain_environment: dict[str, str]) -> None:
    with Command(tmp_path, plain_environment) as command:
        directory = session_directory(command)
        until(lambda: len(children_of(command.process.pid)) > 2, READY_S, command.describe)  # in the midst of ray.init
        assert command.interrupt() == 130, command.output
        assert_nothing_left(directory)
        assert "Traceback" not in command.output


def test_a_worker_that_cannot_start_ends_the_command_with_its_reason(
    tmp_path: Path, plain_environment: dict[str, str]
) -> None:
    with Command(tmp_path, plain_environment, yaml="model: {name: broken-weights}\n") as command:
        assert command.process.wait(READY_S) == 1
        assert "error: layer 3 of model.safetensors is missing" in command.output
        assert "Traceback" not in command.output


# --- a Ray that is there already -----------------------------------------------------------------------------


class Head:
    """`ray start --head`, with a directory and ports of its own."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        gcs_port, dashboard_port, agent_port = free_ports(3)
        self._log = directory / "head.txt"
        command = ["ray", "start", "--head", "--block", "--num-cpus=3", "--object-store-memory=100000000"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={directory}", "--disable-usage-stats"]
        command += [f"--port={gcs_port}", f"--dashboard-port={dashboard_port}"]
        command += [f"--dashboard-agent-listen-port={agent_port}"]
        environment = environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with self._log.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        jobs = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
        self.environment = environment | jobs | {"RAY_ADDRESS": f"127.0.0.1:{gcs_port}"}
        until(lambda: "Ray runtime started" in self._log.read_text(), READY_S, self._log.read_text)

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            ["ray", *arguments], cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module", params=["token", "disabled"])
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    chosen = {"token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "disabled": {"RAY_AUTH_MODE": "disabled"}}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STEELYARD_"))}
    with guarded_directory() as directory:
        started = Head(directory, environment | chosen[request.param] | {"HOME": str(directory)})
        yield started
        started.stop()


def test_a_killed_drivers_cluster_ends_with_its_lease_and_frees_its_name(head: Head, tmp_path: Path) -> None:
    with Command(tmp_path, head.environment) as command:
        command.wait_until_ready()
        pids = [member["cohort"] for member in command.members().values()] + [command.health()["pid"]]
        assert all(map(is_alive, pids))
        with Command(tmp_path, head.environment) as second:
            assert second.process.wait(READY_S) == 2
            assert "'steelyard' already runs on this Ray" in second.output
        command.kill()
        until(lambda: not any(map(is_alive, pids)), LEASE_S + 10)
    with Command(tmp_path, head.environment) as again:
        again.wait_until_ready()
        pids = [member["cohort"] for member in again.members().values()]
        again.process.terminate()
        assert again.process.wait(20) == 0, again.output
        assert not any(map(is_alive, pids))


def test_a_ray_job_serves_and_ray_job_stop_ends_it(head: Head) -> None:
    """The form of the README: the working directory is uploaded, the job attaches to the Ray that runs it."""
    entry = ["--", "python", "-m", "tests.cluster.fakes", "tests/cluster/fakes.yaml"]
    head.ray("job", "submit", "--no-wait", "--submission-id", "serving", "--working-dir", ".", *entry)
    until(lambda: "Ready after" in _logs(head), READY_S, lambda: _logs(head))
    logs = _logs(head)
    url = re.search(r"URL +(http://\S+)/v1", logs)
    assert url, logs
    assert "Stop  ray job stop serving" in logs
    health = httpx.get(f"{url.group(1)}/health", trust_env=False).json()
    pids = [member["cohort"] for member in health["members"]] + [health["pid"]]
    assert all(map(is_alive, pids))
    assert "was stopped" in head.ray("job", "stop", "serving")
    until(lambda: not any(map(is_alive, pids)), 10)


def _logs(head: Head) -> str:
    return head.ray("job", "logs", "serving")


def test_a_detached_cluster_outlives_its_command_until_it_is_stopped(head: Head, tmp_path: Path) -> None:
    config = tmp_path / "detached.yaml"
    config.write_text("cluster: {name: long, lifetime: detached}\nrouter: {port: 0}\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.fakes", str(config)],
        **{"cwd": ROOT, "env": head.environment, "capture_output": True, "text": True, "timeout": READY_S},
    )
    url = re.search(r"URL +(http://\S+)/v1", done.stdout)
    assert url, done.stdout + done.stderr
    members = httpx.get(f"{url.group(1)}/health", trust_env=False).json()["members"]
    assert all(is_alive(member["cohort"]) for member in members)
    stop = [sys.executable, "-m", "cluster", "stop", str(config)]
    first = subprocess.run(stop, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=READY_S)
    assert first.returncode == 0, first.stderr
    assert not any(is_alive(member["cohort"]) for member in members)
    second = subprocess.run(stop, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=READY_S)
    assert second.returncode == 1
    assert second.stderr == "error: no cluster named 'long' runs on this Ray\n"
