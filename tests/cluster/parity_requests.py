"""200 requests over all parameters of chat and plain completions, the same ones every time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.tiny_model import EOS, NAME

SEED = 20261125
NUM_REQUESTS = 200
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,"
NAMES = ("Anna", "Bert", "Cleo", "Dave")
NUM_LANES = len(NAMES)  # requests whose numbers have equal rests by it begin alike; others never share a block
TOPICS = ("the sea", "a long road home", "bread", "how steam engines work", "two sisters", "")

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
WEATHER = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "at": {"enum": ["日", "é", None]}},
    "required": ["on"],
    "additionalProperties": False,
}
Draw = Callable[[random.Random], object]

# What answers can be kept to: in vLLM's words, and in those of the API for chats.
FORMS: tuple[dict[str, object], ...] = (
    {"regex": "[0-9]{2,9}(-[a-f]+)?"},
    {"choice": ["yes", "yet", "no", "日本"]},
    {"grammar": 'start: (WORD " "?)+\nWORD: /[a-z]{1,3}/'},
    {"json": WEATHER},
)
FORMATS: tuple[dict[str, object], ...] = (
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}},
    {"type": "text"},
)
SHARE_OF_FORMS = 0.4


@dataclass(frozen=True, slots=True)
class Asked:
    path: str
    body: dict[str, object]

    @property
    def is_streamed(self) -> bool:
        return bool(self.body.get("stream"))


def _some(rng: random.Random, number: int) -> list[str]:
    return rng.sample(LETTERS, number)


# How each parameter is drawn, and how often it is sent at all.
SHARED: dict[str, tuple[float, Draw]] = {
    "temperature": (0.8, lambda rng: rng.choice((0, 0.3, 0.8, 1.0, 2.0))),
    "top_p": (0.3, lambda rng: rng.choice((0.2, 0.7, 1.0))),
    "top_k": (0.3, lambda rng: rng.choice((-1, 1, 5, 50))),
    "min_p": (0.2, lambda rng: rng.choice((0.0, 0.05))),
    "typical_p": (0.2, lambda rng: rng.choice((0.5, 1.0))),
    "repetition_penalty": (0.2, lambda rng: rng.choice((0.8, 1.3))),
    "presence_penalty": (0.2, lambda rng: rng.choice((-2, 0.5))),
    "frequency_penalty": (0.2, lambda rng: rng.choice((-0.5, 2))),
    "logit_bias": (0.2, lambda rng: {str(rng.randrange(EOS)): rng.choice((-100, -1.5, 5, 100)) for _ in range(3)}),
    "stop": (0.4, lambda rng: rng.choice((_some(rng, 1)[0], _some(rng, 4), ["".join(_some(rng, 2))]))),
    "stop_token_ids": (0.2, lambda rng: [rng.randrange(EOS) for _ in range(8)]),
    "bad_words": (0.2, lambda rng: _some(rng, 3)),
    "ignore_eos": (0.2, lambda rng: rng.random() < 0.5),
    "min_tokens": (0.2, lambda rng: rng.choice((0, 1))),
    "n": (0.4, lambda rng: rng.choice((1, 2, 4))),
    "user": (0.1, lambda _rng: "somebody"),
}
OF_CHAT: dict[str, tuple[float, Draw]] = {
    "max_completion_tokens": (0.5, lambda rng: rng.choice((1, 2, 9, 24))),
}
OF_COMPLETIONS: dict[str, tuple[float, Draw]] = {
    "echo": (0.3, lambda _rng: True),
    "logprobs": (0.5, lambda rng: rng.choice((0, 1, 5))),
}


def parity_requests() -> list[Asked]:
    rng = random.Random(SEED)
    return [_asked(rng, number) for number in range(NUM_REQUESTS)]


def _asked(rng: random.Random, number: int) -> Asked:
    is_chat = rng.random() < 0.5
    body: dict[str, object] = {"model": NAME, "seed": rng.getrandbits(63)}
    body |= _drawn(rng, SHARED) | _drawn(rng, OF_CHAT if is_chat else OF_COMPLETIONS)
    if "max_completion_tokens" not in body:
        body["max_tokens"] = rng.choice((1, 2, 12, 20))
    body |= _form(rng, number, is_chat) if rng.random() < SHARE_OF_FORMS and not body.get("ignore_eos") else {}
    body |= _streaming(rng)
    prompt = _prompt(rng, number)
    if not is_chat:
        several: list[object] = [prompt, f"{number} is another one"]  # which share no block
        body |= {"best_of": 5} if not body.get("stream") and rng.random() < 0.3 else {}
        return Asked(COMPLETIONS, body | {"prompt": rng.choice((prompt, list(prompt.encode()), several))})
    body |= {"tools": TOOLS, "tool_choice": rng.choice(("auto", "none"))} if rng.random() < 0.3 else {}
    if rng.random() < 0.5:
        body |= {"logprobs": True, "top_logprobs": rng.choice((0, 1, 20))}
    return Asked(CHAT, body | {"messages": _messages(rng, prompt, number)})


def _drawn(rng: random.Random, parameters: dict[str, tuple[float, Draw]]) -> dict[str, object]:
    return {name: draw(rng) for name, (share, draw) in parameters.items() if rng.random() < share}


def _form(rng: random.Random, number: int, is_chat: bool) -> dict[str, object]:
    """Every form in turn, so that none is missing; chats know two fields, of which one at a time is taken."""
    if is_chat and rng.random() < 0.6:
        return {"response_format": FORMATS[number % len(FORMATS)]}
    return {"structured_outputs": FORMS[number % len(FORMS)]}


def _streaming(rng: random.Random) -> dict[str, object]:
    if rng.random() < 0.5:
        return {"prompt_logprobs": rng.choice((0, 3))} if rng.random() < 0.3 else {}
    return {"stream": True, **({"stream_options": {"include_usage": True}} if rng.random() < 0.7 else {})}


def _prompt(rng: random.Random, number: int) -> str:
    """Many of a lane begin alike, so that they find blocks in the caches; none goes on after another one's answer."""
    shared = f"{_lane(number)}, write about {rng.choice(TOPICS)}. " * rng.choice((1, 1, 4))
    return f"{shared}Number {number}: " + "".join(rng.choices(LETTERS, k=rng.choice((1, 10, 70))))


def _messages(rng: random.Random, prompt: str, number: int) -> list[dict[str, object]]:
    lane, said = _lane(number), []
    if rng.random() < 0.3:
        said.append({"role": rng.choice(("system", "developer")), "content": f"{lane}, be brief."})
    if rng.random() < 0.3:
        said += [{"role": "user", "content": f"{lane}, hi"}, {"role": "assistant", "content": "Hello"}]
    content: object = [{"type": "text", "text": prompt}, {"type": "text", "text": "Go."}]
    return [*said, {"role": "user", "content": rng.choice((prompt, content))}]


def _lane(number: int) -> str:
    return NAMES[number % NUM_LANES]
