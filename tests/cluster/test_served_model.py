"""The main job, as a user meets it: `steelyard serve configs/local.yaml` with the real model on a local Ray.

One cluster serves all tests of this file, in their order; the last one ends it and looks for what it left.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.guard import processes_of
from engine.models.loader import load_config
from engine.models.store import resolve
from engine.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.ray

MODEL = "smollm2-135m-instruct"
PATIENCE_S = 120.0
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


class Served:
    """`steelyard serve` as a child, and what it printed."""

    def __init__(self, folder: Path, config: str = "configs/local.yaml") -> None:
        command = [sys.executable, "-m", "cluster", "serve", config, "--port", "0"]
        environ = os.environ | {"NO_COLOR": "1", "COLUMNS": "1000"}
        self._output = folder / "output.txt"
        with self._output.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
        self.url = self.wait_for(r"URL +(http://[\d.:]+)/v1")
        self.curl = self.wait_for(r"\n(curl .*)\n")
        self.ray_folder = next(filter(None, map(self._guarded_folder, pids())))

    def wait_for(self, pattern: str) -> str:
        """The pattern's first group, once its output has it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(pattern, self._output.read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, self._output.read_text()
            time.sleep(0.1)
        return found[1].strip()

    def processes(self) -> list[int]:
        """Ids of all processes of its Ray."""
        return list(processes_of(str(self.ray_folder)))

    def engines(self) -> list[int]:
        return [pid for pid in self.processes() if "engine.process" in command_of(pid)]

    def _guarded_folder(self, pid: int) -> Path | None:
        """The folder of the local Ray, if this process is the guard of ours."""
        words = command_of(pid).split()
        is_guard = len(words) > 2 and words[-1] == str(self.process.pid) and words[-3].endswith("guard.py")
        return Path(words[-2]) if is_guard else None


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("served"))
    yield one
    if one.process.poll() is None:
        one.process.send_signal(signal.SIGINT)
        one.process.wait(60)


def test_the_printed_curl_answers_when_pasted(served: Served):
    done = subprocess.run(shlex.split(served.curl), capture_output=True, text=True, timeout=60, check=True)
    reply = json.loads(done.stdout)
    assert reply["model"] == MODEL
    assert len(reply["choices"][0]["message"]["content"]) > 20


def test_the_openai_client_chats_streaming_and_not(served: Served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    whole = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    stream = client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 5


def test_sampling_parameters_and_logprobs_work_through_the_cluster(served: Served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")

    def ask(**more: Any):
        more = {"messages": CAPITAL, "max_tokens": 12, "logprobs": True, "top_logprobs": 3} | more
        return client.chat.completions.create(model=MODEL, **more).choices[0]

    greedy = ask(temperature=0)
    content = greedy.logprobs.content
    assert "".join(one.token for one in content).startswith("The capital of France is Paris.")
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 3 for one in content)
    without = ask(temperature=0, extra_body={"bad_words": ["Paris"], "min_tokens": 10})
    assert "Paris" not in without.message.content and len(without.logprobs.content) >= 10
    paris = next(one for one in content if one.token.strip() == "Paris")
    files = resolve(MODEL)
    (paris_id,) = load_tokenizer(files, load_config(files)).encode(paris.token, add_special=False)
    biased = ask(temperature=0, max_tokens=3, logit_bias={str(paris_id): 100})
    assert biased.message.content == paris.token * 3
    sampling = {"temperature": 1.2, "seed": 11, "frequency_penalty": 0.7, "extra_body": {"min_p": 0.05}}
    assert ask(**sampling).message.content == ask(**sampling).message.content


def test_several_answers_come_from_one_prompt(served: Served):
    """The first is the one that comes alone; each stops on its own; streamed or not they are the same."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    body: dict[str, Any] = {"model": MODEL, "messages": CAPITAL, "max_tokens": 16, "temperature": 1.1, "seed": 3}
    whole = client.chat.completions.create(n=4, stop=["Paris"], **body)
    texts = [choice.message.content or "" for choice in whole.choices]
    alone = client.chat.completions.create(stop=["Paris"], **body)
    assert texts[0] == alone.choices[0].message.content and len(set(texts)) > 1
    assert whole.usage is not None and alone.usage is not None
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", "", "", ""]
    for chunk in client.chat.completions.create(n=4, stop=["Paris"], stream=True, **body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    scored = client.completions.create(
        model=MODEL, prompt="One, two, three", max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    told = (scored.choices[0].model_extra or {})["prompt_logprobs"]
    assert scored.usage is not None and told[0] is None and len(told) == scored.usage.prompt_tokens
    assert max(one["logprob"] for one in told[-1].values()) > -1


def test_bad_input_is_refused_by_field_and_the_cluster_serves_on(served: Served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=CAPITAL)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="word", max_tokens=9000)
    assert refused.value.param == "max_tokens"
    with httpx.Client(base_url=served.url) as http:
        assert http.post("/v1/completions", content=b"{" + b" " * 10_000_000).status_code == 413
        assert http.post("/v1/completions", content=b'{"model": ').status_code == 400
    assert client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4).usage is not None


def test_steelyard_chat_and_status_speak_to_it(served: Served):
    chat = run_command("chat", "What is the capital of France?", "--temperature", "0", "--url", served.url)
    assert (chat.returncode, chat.stdout.strip()) == (0, "The capital of France is Paris.")
    status = run_command("status", "--url", served.url)
    assert status.returncode == 0
    assert "prefill-0" in status.stdout and "decode-0" in status.stdout


def test_workers_killed_while_idle_are_replaced_and_the_cluster_serves_again(served: Served):
    for _ in range(2):  # each worker in turn: the younger engine belongs to the one that was replaced
        before = incarnations(served)
        victim = min(served.engines(), key=lambda pid: start_time_of(pid))
        os.kill(parent_of(victim), signal.SIGKILL)
        wait_until(lambda before=before: len(before - incarnations(served)) == 1 and len(incarnations(served)) == 2)
        wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200)
        body = {"model": MODEL, "messages": CAPITAL, "temperature": 0}
        reply = httpx.post(f"{served.url}/v1/chat/completions", json=body)
        assert reply.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
    assert all(worker["num_leaked_blocks"] == 0 for worker in httpx.get(f"{served.url}/health").json()["workers"])


def test_an_engine_killed_mid_stream_pauses_the_stream_and_changes_no_token(served: Served):
    body: dict[str, object] = {"model": MODEL, "prompt": "Count: 1, 2, 3,", "max_tokens": 60, "ignore_eos": True}
    body |= {"temperature": 0.8, "seed": 7, "frequency_penalty": 0.4, "repetition_penalty": 1.1, "typical_p": 0.95}
    undisturbed = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    disturbed = asyncio.run(stream_and_kill(served, body))
    assert disturbed == undisturbed
    wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 200)


def test_ctrl_c_leaves_no_process_no_port_and_no_shared_memory(served: Served):
    shared_before = {name for name in os.listdir("/dev/shm") if "steelyard" in name}
    group = served.processes()
    assert len(group) > 5
    os.killpg(served.process.pid, signal.SIGINT)  # as a terminal sends it
    assert served.process.wait(60) == 0
    assert not any(is_alive(pid) for pid in group)
    assert not served.ray_folder.exists()
    assert not shared_before and not any("steelyard" in name for name in os.listdir("/dev/shm"))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


# --- helpers ---------------------------------------------------------------------------------------------------


async def stream_and_kill(served: Served, body: dict[str, object]) -> str:
    """Stream a completion; after some pieces kill the decode worker's engine. Returns the whole text."""
    pieces: list[str] = []
    async with (
        httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            pieces.append(event["choices"][0]["text"])
            if len(pieces) == 10:
                os.kill(busiest_engine(served), signal.SIGKILL)
    return "".join(pieces)


def busiest_engine(served: Served) -> int:
    """The engine that has just used the most processor time: the one that decodes."""
    before = {pid: cpu_ticks_of(pid) for pid in served.engines()}
    time.sleep(0.3)
    return max(before, key=lambda pid: cpu_ticks_of(pid) - before[pid])


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)


def incarnations(served: Served) -> set[str]:
    workers = httpx.get(f"{served.url}/health").json()["workers"]
    return {worker["incarnation"] for worker in workers if worker["connected"]}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.2)


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def parent_of(pid: int) -> int:
    stat = _stat(pid)
    return int(stat[1]) if stat else 0


def is_alive(pid: int) -> bool:
    stat = _stat(pid)
    return bool(stat) and stat[0] != "Z"


def start_time_of(pid: int) -> int:
    return int(_stat(pid)[19])


def cpu_ticks_of(pid: int) -> int:
    stat = _stat(pid)
    return int(stat[11]) + int(stat[12]) if stat else 0
