"""The servers that benchmarks/relay.py compares: `python -m benchmarks.relay_server KIND` prints a port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import uvloop
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from cluster.garbage import collect_seldom
from cluster.gateway import Server, SystemNames, server_config
from cluster.listener import listen
from engine.errors import TransferFailed
from engine.models.detokenizer import IncrementalDetokenizer, Pieces
from engine.streams import StreamBatch
from engine.types import EngineStats, FinishReason, Key, Move, Role, Submission, TokenOutput
from router.config import RouterConfig
from router.dispatch import Dispatcher
from router.door import Door
from router.gateway import create_app
from router.membership import Member, Membership
from router.text import TextModel

CONFIG = RouterConfig(port=0, max_live_requests=1024)
STATS = EngineStats(num_blocks=1, num_free_blocks=1)


class LetterTokenizer:
    """Tokens are bytes, by a real byte-level decoder."""

    vocab_size = 256

    def __init__(self) -> None:
        self._tokenizer = Tokenizer(BPE(vocab={chr(one): one for one in range(33, 127)}, merges=[]))
        self._tokenizer.decoder = ByteLevel()

    def encode(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode())

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_name(self, token_id: int) -> str:
        return chr(token_id)

    def special_id(self, token: str) -> int | None:
        return None

    def render_chat(
        self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None, variables: Mapping[str, object] | None = None,
    ) -> str:  # fmt: skip
        return "".join(str(message["content"]) for message in messages)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def visible_ids(
        self, ids: Iterable[int], skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> list[int]:
        return list(ids)


@dataclass(eq=False)
class EagerWorker:
    """Answers each sequence with B, B, B..., a step for all as soon as the last one was read. A WorkerClient."""

    stats_stand: ClassVar[bool] = True

    member: Member
    wanted: dict[Key, tuple[int, int]] = field(default_factory=dict)  # (next index, number of tokens)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def submit(self, submission: Submission, role_epoch: int, timeout_s: float) -> None:
        for request in submission.requests:
            self.wanted[request.key] = (0, request.sampling.max_tokens)
        self.news.set()

    async def abort(self, key: Key, timeout_s: float) -> None:
        self.wanted.pop(key, None)

    async def move(self, move: Move, timeout_s: float) -> None:
        raise TransferFailed("this worker is the only one")

    async def tokens(self, gateway_id: str) -> AsyncGenerator[StreamBatch]:
        yield StreamBatch((), STATS)
        while True:
            self.news.clear()
            if not self.wanted:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.news.wait(), 1.0)
            yield StreamBatch(tuple(self._step()), STATS)
            for _ in range(3):  # turns of the loop: until all that wait for this step have sent it
                await asyncio.sleep(0)

    def _step(self) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        for key, (index, count) in list(self.wanted.items()):
            is_last = index + 1 == count
            outputs.append(TokenOutput(key, index, (ord("B"),), FinishReason.LENGTH if is_last else None))
            self.wanted[key] = (index + 1, count)
            if is_last:
                del self.wanted[key]
        return outputs

    def stats_by_now(self, told: EngineStats) -> EngineStats:
        return told

    async def close(self) -> None:
        self.wanted.clear()


class EagerWorkers:
    """A Connector."""

    def connect(self, member: Member) -> EagerWorker:
        return EagerWorker(member)


def our_app() -> object:
    dispatcher = Dispatcher(CONFIG, "bench", EagerWorkers(), SystemNames())
    dispatcher.apply(Membership(1, (Member("p", "1", Role.PREFILL, 0, "p:1", "c"),)))
    tokenizer = LetterTokenizer()
    pieces = Pieces(tokenizer)
    model = TextModel("m", 1 << 20, tokenizer, lambda _shown: IncrementalDetokenizer(tokenizer, pieces=pieces))
    return create_app(Door(dispatcher), model, CONFIG, steps=dispatcher.step_history, wall_clock=time.time)


def echo_app(takes_turns: bool) -> object:
    """Sends as many events as tokens are asked for."""
    from router.answer import STREAM_HEADERS
    from router.replies import STREAM_END, CompletionReplies

    replies = CompletionReplies("0" * 24, "m", int(time.time()), "fp_dev")
    frame = replies.text(0, "B")
    last = frame + replies.closing(0, FinishReason.LENGTH)

    async def app(scope, receive, send) -> None:
        message = await receive()
        body = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        num_tokens = json.loads(body)["max_tokens"]
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        for _ in range(num_tokens - 1):
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            if takes_turns:
                await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": STREAM_END})

    return app


async def serve(kind: str) -> None:
    app = our_app() if kind == "ours" else echo_app(takes_turns=kind == "echo in turns")
    listener = listen("127.0.0.1", 0)
    collect_seldom()
    print(listener.getsockname()[1], flush=True)
    await Server(server_config(app, CONFIG)).serve(sockets=[listener])


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
