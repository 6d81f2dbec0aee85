"""The command line as its user meets it: exit codes, messages, and a small HTTP server in the gateway's place."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import cast

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster import launch
from cluster.cli import app
from cluster.client import ApiClient, ApiError, ChatOptions, Message
from cluster.config import ClusterConfig
from cluster.pull_progress import pull_progress
from cluster.ray_session import RaySession, local_ray_environment, ray_address
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=typed, env={"COLUMNS": "200", "TERM": "dumb"})


# --- a gateway's face -----------------------------------------------------------------------------------------

WORKER = {
    "worker_id": "decode-0", "incarnation": "cafe0123cafe0123", "role": "decode", "address": "10.0.0.7:4321",
    "connected": True, "num_running": 3, "num_waiting": 1,
    "num_blocks": 2048, "num_free_blocks": 2000, "num_leaked_blocks": 0,
}  # fmt: skip
OTHER = WORKER | {"worker_id": "prefill-0", "role": "prefill", "connected": False, "num_leaked_blocks": 2}
HEALTH = {
    "healthy": True, "reason": "", "canary_age_s": 1.25, "membership_version": 7, "num_live_requests": 4,
    "workers": [WORKER, OTHER],
}  # fmt: skip


class Face(ThreadingHTTPServer):
    """Answers every question with the same pieces, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaceHandler)
        self.bodies: list[dict] = []
        self.health = HEALTH
        self.events = [*map(_chunk, ["A bal", "ance", " \x1b[2Jwith one pan"]), "[DONE]"]
        self.fault: dict | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _chunk(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


class FaceHandler(BaseHTTPRequestHandler):
    @property
    def face(self) -> Face:
        return cast(Face, self.server)

    def do_GET(self) -> None:
        body = self.face.health if self.path == "/health" else {"data": [{"id": "tiny"}]}
        self._answer(200 if body.get("healthy", True) else 503, json.dumps(body).encode())

    def do_POST(self) -> None:
        self.face.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        if self.face.fault is not None:
            self._answer(400, json.dumps({"error": self.face.fault}).encode())
        else:
            self._answer(200, "".join(f"data: {event}\n\n" for event in self.face.events).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def face() -> Iterator[Face]:
    with Face() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# --- chat -----------------------------------------------------------------------------------------------------


def test_one_question_is_answered_and_sent_as_asked(face: Face) -> None:
    flags = ("--system", "Be brief.", "--max-tokens", "9", "--temperature", "0")
    done = run("chat", "What is it?", "--url", face.url, *flags)
    assert done.exit_code == 0
    assert done.stdout == "A balance [2Jwith one pan\n", "an escape sequence never reaches the terminal"
    assert face.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
            "stream": True,
            "max_tokens": 9,
            "temperature": 0.0,
        }
    ]


def test_a_conversation_remembers_what_was_said(face: Face) -> None:
    done = run("chat", "--url", face.url + "/v1/", typed="first\n\nsecond\n")
    assert done.exit_code == 0
    assert [(each["role"], each["content"]) for each in face.bodies[1]["messages"]] == [
        ("user", "first"),
        ("assistant", "A balance \x1b[2Jwith one pan"),
        ("user", "second"),
    ]


def test_a_refused_question_is_shown_and_forgotten(face: Face) -> None:
    face.fault = {"message": "max_tokens must be at least 1", "param": "max_tokens", "type": "invalid_request_error"}
    done = run("chat", "--url", face.url, typed="first\nsecond\n")
    assert done.exit_code == 0
    assert done.stdout.count("max_tokens must be at least 1") == 2
    assert [each["content"] for each in face.bodies[1]["messages"]] == ["second"]
    once = run("chat", "first", "--url", face.url)
    assert (once.exit_code, once.stderr) == (1, "error: max_tokens must be at least 1\n")


def test_an_error_in_the_midst_of_an_answer_is_shown(face: Face) -> None:
    face.events = [_chunk("A bal"), json.dumps({"error": {"message": "the worker was lost", "code": "worker_lost"}})]
    done = run("chat", "What is it?", "--url", face.url)
    assert done.exit_code == 1
    assert "A bal" in done.stdout
    assert done.stderr == "error: the worker was lost\n"


def test_an_interrupted_answer_is_closed_and_stays_in_the_history(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def interrupted(self: ApiClient, messages: list[Message], options: ChatOptions) -> Iterator[str]:
        try:
            yield f"{len(messages)} known"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(ApiClient, "stream_chat", interrupted)
    done = run("chat", "--url", face.url, typed="first\nsecond\n")
    assert done.exit_code == 0
    assert closed == [True, True]
    assert "1 known [interrupted]" in done.stdout
    assert "3 known [interrupted]" in done.stdout


def test_a_server_that_speaks_otherwise_is_told_from_one_that_is_not_there(face: Face) -> None:
    face.events = ['{"no": "choices"}']
    with ApiClient(face.url) as client, pytest.raises(ApiError, match="does not answer as a Steelyard gateway"):
        list(client.stream_chat([Message("user", "hello")], ChatOptions("tiny")))


# --- status ---------------------------------------------------------------------------------------------------


def test_status_shows_pools_workers_and_load(face: Face) -> None:
    done = run("status", "--url", face.url)
    assert done.exit_code == 0
    assert "healthy · last canary 1.2 s ago · membership 7 · 4 live requests" in done.stdout
    rows = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()[2:]]
    assert rows == [
        ["prefill", "prefill-0", "cafe0123", "10.0.0.7:4321", "down", "3", "1", "48 of 2048, 2 leaked"],
        ["decode", "decode-0", "cafe0123", "10.0.0.7:4321", "up", "3", "1", "48 of 2048"],
    ]


def test_status_of_an_unhealthy_cluster_exits_with_1(face: Face) -> None:
    face.health = HEALTH | {"healthy": False, "reason": "no decode worker", "canary_age_s": None}
    done = run("status", "--url", face.url)
    assert done.exit_code == 1
    assert "unhealthy: no decode worker · last canary never" in done.stdout


@pytest.mark.parametrize("command", [["status"], ["chat", "hello"], ["profile"]])
def test_when_nothing_listens_it_says_so(command: list[str]) -> None:
    done = run(*command, "--url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: nothing listens at http://127.0.0.1:9")
    assert "Traceback" not in done.output


# --- configuration and models ---------------------------------------------------------------------------------


def test_a_right_file_is_summarised() -> None:
    done = run("config", "check", str(ROOT / "configs/local.yaml"))
    assert done.exit_code == 0
    assert "prefill  1 x 1 rank, 1 CPU each" in done.stdout
    assert "http://127.0.0.1:8000" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router: {prot: 8000}", "router.prot: unknown key; did you mean 'port'?"),
        ("router: {port: no}", "router.port: expected a whole number"),
        ("router: [", "line 1"),
        (None, "cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [["config", "check"], ["serve"]])
def test_a_wrong_file_gives_one_message_and_exit_code_2(
    tmp_path: Path, command: list[str], text: str | None, message: str
) -> None:
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    done = run(*command, str(path))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_flags_win_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(launch, "serve", lambda config, console, verbose: served.append(config) or 0)
    done = run("serve", str(ROOT / "configs/local.yaml"), "--port", "8123", "--host", "0.0.0.0")
    assert done.exit_code == 0
    assert (served[0].router.host, served[0].router.port) == ("0.0.0.0", 8123)
    assert run("serve", str(ROOT / "configs/local.yaml"), "--port", "81234").exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ray_starts_waits_for_that_and_then_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    steps: list[str] = []

    @contextmanager
    def starting(_config: ClusterConfig, verbose: bool) -> Iterator[RaySession]:
        signal.raise_signal(number)
        steps.append("started")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield RaySession(local=True, address="local")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch, "ray_session", starting)
    said = StringIO()
    assert launch.serve(ClusterConfig(), Console(file=said)) == launch.INTERRUPTED
    assert steps == ["started"]
    assert said.getvalue().endswith("interrupted\n")


@pytest.mark.parametrize(("address", "num_signals"), [(None, 2), ("there:6379", 1)])
def test_a_second_interrupt_waits_for_nothing_and_none_waits_for_a_ray_that_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, address: str | None, num_signals: int
) -> None:
    steps: list[str] = []

    @contextmanager
    def starting(_config: ClusterConfig, verbose: bool) -> Iterator[RaySession]:
        for _ in range(num_signals):
            signal.raise_signal(signal.SIGINT)
        steps.append("started")
        yield RaySession(local=address is None, address=address or "local")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch, "ray_session", starting)
    config = ClusterConfig.model_validate({"ray": {"address": address}})
    assert launch.serve(config, Console(file=StringIO())) == launch.INTERRUPTED
    assert steps == []


def test_the_catalogue_is_listed_with_licence_and_size() -> None:
    done = run("models", "list")
    assert done.exit_code == 0
    assert re.search(r"smollm2-135m-instruct +Apache-2\.0 +89 MiB +94 MiB", done.stdout)
    assert re.search(r"gemma-3-270m +Gemma Terms of Use +227 MiB +242 MiB", done.stdout)
    assert "gemma-3-270m: Gemma Terms of Use: use-restricted, see https://ai.google.dev/gemma/terms" in done.stdout


def test_a_pull_s_progress_is_lines_in_a_log_and_a_bar_on_a_terminal() -> None:
    for is_terminal in (False, True):
        console = Console(file=StringIO(), force_terminal=is_terminal, width=100)
        with pull_progress(console) as report:
            for done in range(30, 101):
                report("download", done * 2**20, 100 * 2**20)
            report("unpack", 2**20, 2**20)
        assert isinstance(console.file, StringIO)
        lines = console.file.getvalue().splitlines()
        if is_terminal:
            assert any("\x1b[" in line for line in lines)
        else:
            tenths = [f"download {done} of 100 MiB" for done in range(30, 101, 10)]
            assert lines == [*tenths, "unpack 1 of 1 MiB"]


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    done = run("models", "pull", "no-such-model", "--cache-dir", str(tmp_path))
    assert done.exit_code == 1
    assert "no model 'no-such-model'" in done.stderr


def test_version_and_help_are_quick_because_nothing_heavy_is_imported() -> None:
    check = "import sys, cluster.cli; sys.exit(bool({'ray', 'torch', 'httpx', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0
    assert run("--version").stdout.startswith("steelyard ")
    assert "serve" in run("--help").stdout


# --- what the environment decides -----------------------------------------------------------------------------


def test_a_local_ray_has_token_authentication_unless_the_user_chose() -> None:
    fresh = local_ray_environment({})
    assert fresh["RAY_AUTH_MODE"] == "token"
    assert len(fresh["RAY_AUTH_TOKEN"]) == 64
    assert fresh["RAY_AUTH_TOKEN"] != local_ray_environment({})["RAY_AUTH_TOKEN"]
    for chosen in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"}):
        assert not local_ray_environment(chosen).keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    for chosen in ({"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "/mine"}):
        assert "RAY_AUTH_TOKEN" not in local_ray_environment(chosen)
        assert local_ray_environment(chosen)["RAY_AUTH_MODE"] == "token"


def test_the_files_address_wins_over_the_environments() -> None:
    from cluster.config import RaySection

    here, there = ClusterConfig(), ClusterConfig(ray=RaySection(address="there:6379"))
    assert ray_address(here, {}) is None
    assert ray_address(here, {"RAY_ADDRESS": "env:6379"}) == "env:6379"
    assert ray_address(there, {"RAY_ADDRESS": "env:6379"}) == "there:6379"


def test_the_secret_comes_from_the_environment_or_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEELYARD_SECRET", raising=False)
    assert launch.cluster_secret() != launch.cluster_secret()
    monkeypatch.setenv("STEELYARD_SECRET", "sixteen letters!")
    assert launch.cluster_secret() == b"sixteen letters!"
    monkeypatch.setenv("STEELYARD_SECRET", "short")
    with pytest.raises(ConfigError, match="at least 16 characters"):
        launch.cluster_secret()


def test_a_detached_cluster_on_a_local_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "detached.yaml"
    path.write_text("cluster: {lifetime: detached}")
    done = run("serve", str(path))
    assert done.exit_code == 2
    assert "cluster.lifetime: detached needs a Ray that outlives this command" in done.stderr
