"""An open-loop client: requests that come when a schedule says so, whatever has become of the ones before.

1. `schedule` draws arrivals (Poisson) and, of each, which of the prompts it asks and how long an answer it wants;
2. `play` sends each at its time over HTTP and notes when its tokens came;
3. a 429 may be tried again when its Retry-After is over; each try is an arrival of its own.
All times are seconds of this process's clock. Knows OpenAI's completions and server-sent events only, so that peers get
the very same load.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

READ_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and what was promised of answers to it; infinite: nothing."""

    number: int
    text: str
    ttft_s: float = math.inf
    tpot_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt: Prompt
    num_tokens: int  # of the answer


@dataclass(slots=True)
class Outcome:
    """What became of one arrival. `token_times` are those of the events that brought text."""

    arrival: Arrival
    status: int = 0  # HTTP; 0: it could not be sent, or its answer broke off
    error: str = ""  # with which its answer broke off
    sent_s: float = 0.0
    token_times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    retry_after_s: float | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.sent_s if self.token_times else math.inf

    @property
    def tt2t_s(self) -> float:
        """Time to the second token: where a peer streams the first one before its KV has moved, or after."""
        return self.token_times[1] - self.sent_s if len(self.token_times) > 1 else math.inf

    @property
    def tpot_s(self) -> float:
        if self.num_tokens < 2 or not self.token_times:
            return math.inf
        return (self.token_times[-1] - self.token_times[0]) / (self.num_tokens - 1)

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.num_tokens == self.arrival.num_tokens

    @property
    def was_refused(self) -> bool:
        return self.status == 429

    def keeps(self, *, judge_second: bool = False) -> bool:
        """Did it meet its targets? With `judge_second` its second token was due one TPOT after the first."""
        if not self.is_whole:
            return False
        prompt = self.arrival.prompt
        in_time = self.tt2t_s <= prompt.ttft_s + prompt.tpot_s if judge_second else self.ttft_s <= prompt.ttft_s
        return in_time and self.tpot_s <= prompt.tpot_s


def schedule(
    prompts: Sequence[Prompt], rate: float, duration_s: float, lengths: tuple[int, int], seed: int
) -> list[Arrival]:
    """Poisson arrivals of `rate` per second; prompts in random order, answers of `lengths` tokens, both included."""
    random = np.random.default_rng(seed)
    arrivals, now = list[Arrival](), 0.0
    while (now := now + float(random.exponential(1 / rate))) < duration_s:
        prompt = prompts[int(random.integers(len(prompts)))]
        arrivals.append(Arrival(now, prompt, int(random.integers(lengths[0], lengths[1] + 1))))
    return arrivals


async def play(
    url: str, model: str, arrivals: Sequence[Arrival], *, with_targets: bool = False, max_tries: int = 1
) -> list[Outcome]:
    """All outcomes, of second tries, too. `with_targets` sends what was promised as headers."""
    begun = time.perf_counter()
    outcomes = list[Outcome]()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=READ_TIMEOUT_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as client:

        async def one(arrival: Arrival) -> None:
            await asyncio.sleep(begun + arrival.at_s - time.perf_counter())
            for _ in range(max_tries):
                outcome = await _ask(client, model, arrival, with_targets)
                outcomes.append(outcome)
                if not outcome.was_refused or outcome.retry_after_s is None:
                    return
                await asyncio.sleep(outcome.retry_after_s)

        await asyncio.gather(*map(one, arrivals))
    return outcomes


async def _ask(client: aiohttp.ClientSession, model: str, arrival: Arrival, with_targets: bool) -> Outcome:
    outcome = Outcome(arrival, sent_s=time.perf_counter())
    headers = _headers(arrival.prompt) if with_targets else {}
    await _stream(client, "/v1/completions", _body(model, arrival), headers, outcome)
    return outcome


def _body(model: str, arrival: Arrival) -> dict[str, object]:
    return {
        "model": model, "prompt": arrival.prompt.text, "max_tokens": arrival.num_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def _stream(
    client: aiohttp.ClientSession, url: str, body: dict[str, object], headers: dict[str, str], outcome: Outcome
) -> None:
    """Notes what comes. An answer that breaks off has the status 0."""
    try:
        async with client.post(url, json=body, headers=headers) as reply:
            if reply.status != 200:
                outcome.status, outcome.retry_after_s = reply.status, _retry_after(reply)
                return
            async for line in reply.content:
                _take(outcome, line)
        outcome.status = 200 if outcome.num_tokens else 0
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.status, outcome.error = 0, repr(error)


def _take(outcome: Outcome, line: bytes) -> None:
    if not line.startswith(b"data: {"):
        return
    now, event = time.perf_counter(), json.loads(line[6:])
    if error := event.get("error"):
        outcome.error = f"{error.get('code')}: {error.get('message')}"
    if usage := event.get("usage"):
        outcome.num_tokens = usage["completion_tokens"]
    if text := "".join(choice.get("text") or "" for choice in event.get("choices", ())):
        outcome.text += text
        outcome.token_times.append(now)


def _headers(prompt: Prompt) -> dict[str, str]:
    pairs = (("x-slo-ttft-ms", prompt.ttft_s), ("x-slo-tpot-ms", prompt.tpot_s))
    return {name: f"{1e3 * value:.1f}" for name, value in pairs if math.isfinite(value)}


def _retry_after(reply: aiohttp.ClientResponse) -> float | None:
    value = reply.headers.get("retry-after")
    return float(value) if value is not None and value.isdigit() else None


async def play_pair(prefill: str, decode: str, model: str, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """The same with vLLM's two calls: the prompt at one server, then the answer, with what it said, at the other."""
    begun, outcomes = time.perf_counter(), list[Outcome]()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:

        async def one(arrival: Arrival) -> None:
            await asyncio.sleep(begun + arrival.at_s - time.perf_counter())
            outcome = Outcome(arrival, sent_s=time.perf_counter())
            outcomes.append(outcome)
            body = _body(model, arrival)
            remote = {"do_remote_decode": True, "do_remote_prefill": False}
            first = body | {"max_tokens": 1, "stream": False, "kv_transfer_params": remote}
            del first["stream_options"]
            try:
                async with client.post(f"{prefill}/v1/completions", json=first) as reply:
                    told = await reply.json()
            except (aiohttp.ClientError, TimeoutError):
                return  # its status stays 0
            later = body | {"kv_transfer_params": told["kv_transfer_params"]}
            await _stream(client, f"{decode}/v1/completions", later, {}, outcome)

        await asyncio.gather(*map(one, arrivals))
    return outcomes
