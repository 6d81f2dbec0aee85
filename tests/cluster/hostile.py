"""More than 500 hostile requests, the same ones every time: what is sent, and what may come of it.

`attacks()` is the table: each function below it gives the variations of one family. What a field's fault must name is
said with it; a body's fault that belongs to no field names none.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto

from router.errors import MAX_SHOWN_CHARS
from router.responses.body import MAX_ITEMS, ResponseBody
from router.schema import ChatBody, CompletionBody
from router.tokens import DetokenizeBody, TokenizeBody
from tests.cluster.tiny_model import EOS, MAX_CONTEXT, NAME, VOCAB

MAX_BODY_BYTES = 200_000
SEED = 20261124
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"


class Outcome(StrEnum):
    REFUSED = auto()  # a 4xx in OpenAI's format, whose `param` is ours
    BROKEN = auto()  # a 4xx in OpenAI's format, or no answer; and the connection is closed
    BESIDE = auto()  # as BROKEN, after an answer to the good request that came first
    LEFT = auto()  # the client leaves as soon as it has read `reads` bytes
    SAT_OUT = auto()  # the client reads nothing until the server has let it go


@dataclass(frozen=True, slots=True)
class Attack:
    family: str
    data: bytes
    outcome: Outcome = Outcome.REFUSED
    param: str | None = None  # of REFUSED
    status: int = 400  # of REFUSED
    half_close: bool = False  # after the data
    reads: int = 0  # of LEFT


def attacks() -> list[Attack]:
    """All of them, shuffled."""
    made = [
        *wrong_types(), *unknown_fields(), *broken_json(), *numbers(), *duplicate_keys(), *biases(), *stops(), *empty(),
        *prompts(), *roles_and_models(), *routes_and_methods(), *lengths(), *chunks(), *too_large(), *no_http(),
        *half_open(), *pipelined(), *leaving(), *cut_off(20), *responses(), *stored(), *token_routes(), *floods(),
    ]  # fmt: skip
    random.Random(SEED).shuffle(made)
    return made


# --- requests -------------------------------------------------------------------------------------------------


def chat(**fields: object) -> dict[str, object]:
    return {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3} | fields


def completion(**fields: object) -> dict[str, object]:
    return {"model": NAME, "prompt": "hi", "max_tokens": 3} | fields


def response(**fields: object) -> dict[str, object]:
    return {"model": NAME, "input": "hi", "max_output_tokens": 3} | fields


def post(path: str, body: object, *headers: str) -> bytes:
    """A whole request; `body` is JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def raw(path: str, *headers: str, body: bytes = b"") -> bytes:
    """A request whose headers are what they are."""
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode() + body


def refused(family: str, path: str, body: object, param: str | None, status: int = 400) -> Attack:
    return Attack(family, post(path, body), param=param, status=status)


def with_prompt(literal: bytes) -> bytes:
    """A completion's body with this JSON, or what is meant to be JSON, as its prompt."""
    return b'{"model":"%s","max_tokens":3,"prompt":%s}' % (NAME.encode(), literal)


# --- fields ---------------------------------------------------------------------------------------------------


def wrong_types() -> Iterator[Attack]:
    """Every field of all bodies with two values that it cannot have."""
    for path, kind, body in (
        (CHAT, ChatBody, chat()),
        (COMPLETIONS, CompletionBody, completion()),
        (RESPONSES, ResponseBody, response()),
        (TOKENIZE, TokenizeBody, {}),
        (DETOKENIZE, DetokenizeBody, {"tokens": []}),
    ):
        for field in kind.model_fields:
            for value in ([{"a": [1]}], 77.5):
                yield refused("wrong type", path, body | {field: value}, field)


def unknown_fields() -> Iterator[Attack]:
    names = [
        "colour",
        "Model",
        "model ",
        " model",
        "\0",
        "__proto__",
        "max-tokens",
        "日本",
        "a.b",
        "x" * 1000,
        "messages.0",
    ]
    for name in names:
        yield refused("unknown field", COMPLETIONS, completion(**{name: 1}), _cut(name))
    yield refused(
        "unknown field", CHAT, chat(messages=[{"role": "user", "content": "x", "weight": 1}]), "messages.0.weight"
    )
    yield refused("unknown field", CHAT, chat(stream=True, stream_options={"x": 1}), "stream_options.x")


def _cut(name: str) -> str:
    return name if len(name) <= MAX_SHOWN_CHARS else name[:MAX_SHOWN_CHARS] + "..."


def numbers() -> Iterator[Attack]:
    """Absurd ones, as JSON text, because Python's own encoder would refuse some."""
    floats = (
        "temperature",
        "top_p",
        "frequency_penalty",
        "presence_penalty",
        "min_p",
        "typical_p",
        "repetition_penalty",
    )
    for field in floats:
        for literal in ("1e400", "NaN", "Infinity", "-Infinity", "9" * 400, "1e308"):
            yield _number(field, literal)
    for field, literals in {
        "max_tokens": ("0", "-1", str(MAX_CONTEXT), str(2**31), str(2**63), "1" * 30, "1e3", "9" * 400),
        "n": ("0", "-1", "1000000", str(2**40)),
        "min_tokens": ("-1", "4", str(2**31), "9" * 400),
        "top_k": ("-2", str(2**31), "1.0"),
        "logprobs": ("6", "-1", "1e400", str(2**63)),
        "seed": (str(2**64), str(-(2**63) - 1), "NaN", "1" * 400),
    }.items():
        for literal in literals:
            yield _number(field, literal)
    for top in (21, -1, 10**9):
        yield refused("number", CHAT, chat(logprobs=True, top_logprobs=top), "top_logprobs")
    yield refused("number", CHAT, chat(top_logprobs=5), "top_logprobs")
    yield refused("number", CHAT, chat(max_completion_tokens=2**40), "max_completion_tokens")
    for digits in (5_000, 100_000):  # more than any parser of ours turns into a number: not even the field is read
        yield refused("number", COMPLETIONS, _with("seed", "1" * digits), None)


def _number(field: str, literal: str) -> Attack:
    return refused("number", COMPLETIONS, _with(field, literal), field)


def _with(field: str, literal: str) -> bytes:
    body = completion()
    body.pop(field, None)
    return json.dumps(body)[:-1].encode() + f', "{field}": {literal}}}'.encode()


def duplicate_keys() -> Iterator[Attack]:
    for field, literal in (("max_tokens", "2"), ("max_tokens", "3"), ("model", f'"{NAME}"'), ("prompt", '"a"')):
        body = json.dumps(completion())[:-1] + f', "{field}": {literal}}}'
        yield refused("duplicate key", COMPLETIONS, body.encode(), field)
    message = '{"role": "user", "content": "a", "role": "system"}'
    body = f'{{"model": "{NAME}", "messages": [{message}]}}'.encode()
    yield refused("duplicate key", CHAT, body, "messages.0.role")
    body = json.dumps(completion())[:-1].encode() + b', "logit_bias": {"1": 1, "1": 2}}'
    yield refused("duplicate key", COMPLETIONS, body, "logit_bias.1")


def biases() -> Iterator[Attack]:
    for token_id in (VOCAB, 999_999_999):
        yield refused("logit_bias", CHAT, chat(logit_bias={str(token_id): 1}), f"logit_bias.{token_id}")
    for key in ("01", " 1", "1 ", "-1", "+1", "1e3", "1.0", "", "0x1", "١", "1_0", "9" * 10, "9" * 400, "the", "\0"):
        yield refused("logit_bias", CHAT, chat(logit_bias={key: 1}), "logit_bias")
    for value in (101, -101, True, None, "1", [1], 10**400):
        yield refused("logit_bias", CHAT, chat(logit_bias={"1": value}), "logit_bias")
    yield refused("logit_bias", CHAT, chat(logit_bias={str(index): 1 for index in range(301)}), "logit_bias")


def stops() -> Iterator[Attack]:
    for stop in (list("abcde"), "x" * 1025, ["x" * 1025], ["a", ""], [[]], ["a", 1], ["x"] * 10_000):
        yield refused("stop", COMPLETIONS, completion(stop=stop), "stop")
    yield refused("stop", COMPLETIONS, completion(stop_token_ids=[1] * 65), "stop_token_ids")
    yield refused("stop", COMPLETIONS, completion(stop_token_ids=[1, VOCAB]), "stop_token_ids.1")
    yield refused("stop", COMPLETIONS, completion(stop_token_ids=[-1]), "stop_token_ids.0")
    yield refused("stop", COMPLETIONS, completion(bad_words=["x"] * 65), "bad_words")
    yield refused("stop", COMPLETIONS, completion(bad_words=["x" * 1025]), "bad_words.0")


def empty() -> Iterator[Attack]:
    for body in (b"", b" ", b"\n\n", b"[]", b"null", b'""', b"0"):
        yield refused("empty", CHAT, body, None)
    yield refused("empty", CHAT, {}, "model")
    yield refused("empty", CHAT, chat(model=""), "model")
    yield refused("empty", CHAT, chat(messages=[]), "messages")
    yield refused("empty", CHAT, chat(messages=[{}]), "messages.0.role")
    yield refused("empty", CHAT, chat(messages=[{"role": "user", "content": []}]), "messages.0.content")
    for prompt in ("", [], [""], [[]]):
        yield refused("empty", COMPLETIONS, completion(prompt=prompt), "prompt")
    yield refused("empty", COMPLETIONS, completion(stop=""), "stop")
    yield refused("empty", COMPLETIONS, completion(bad_words=[""]), "bad_words.0")


def prompts() -> Iterator[Attack]:
    long = [{"role": "user", "content": "x" * MAX_CONTEXT}]
    yield refused("prompt", CHAT, chat(messages=long), "messages")
    yield refused("prompt", CHAT, chat(messages=long * 20), "messages")
    for prompt in (
        "x" * MAX_CONTEXT,
        "日" * 20_000,
        [1] * MAX_CONTEXT,
        [1] * 50_000,
        [VOCAB],
        [-1],
        [EOS, 2**31],
        [2**63],
    ):
        yield refused("prompt", COMPLETIONS, completion(prompt=prompt), "prompt")
    for ids in ([10**30], [True], [1.0], [None], ["a", 1], ["a"] * 200, [1, "a"], [[[1]]]):
        yield refused("prompt", COMPLETIONS, completion(prompt=ids), "prompt")


def roles_and_models() -> Iterator[Attack]:
    for role in ("wizard", "", "System", None, 1, "user\0", ["user"], "user " * 1000):
        yield refused("role", CHAT, chat(messages=[{"role": role, "content": "x"}]), "messages.0.role")
    for model in ("other", NAME + "\0", NAME.upper(), "../" + NAME, "x" * 10_000, "日本"):
        yield refused("model", COMPLETIONS, completion(model=model), "model", 404)


# --- bodies ---------------------------------------------------------------------------------------------------


def broken_json() -> Iterator[Attack]:
    bad_utf8 = (
        b"\xff",
        b"\x80",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xe6\x97",
        b"\xfe\xff",
        b"\xf8\x88",
    )
    for bad in bad_utf8:
        yield refused("UTF-8", COMPLETIONS, with_prompt(b'"a' + bad + b'"'), None)
        yield refused("UTF-8", COMPLETIONS, bad + json.dumps(completion()).encode(), None)
    for text in (b"\\ud800", b"\\udfff", b"\\ud800\\ud800", b"\\ud83d", b"\\u12", b"\\x00", b"\0", b"\n"):
        yield refused("escape", COMPLETIONS, with_prompt(b'"' + text + b'"'), None)
    yield refused("escape", COMPLETIONS, with_prompt(b'"a","\\ud800":1,"b":"b"'), None)
    for depth in (300, 10_000, 80_000):
        yield refused("depth", COMPLETIONS, with_prompt(b"[" * depth + b"]" * depth), None)
        yield refused("depth", COMPLETIONS, with_prompt(b"[" * depth), None)
    for depth in (300, 10_000):
        deep = b'{"a":' * depth + b"1" + b"}" * depth
        yield refused("depth", COMPLETIONS, deep, None)
        yield refused("depth", COMPLETIONS, with_prompt(b'"a","logit_bias":' + deep), None)
        yield refused("depth", CHAT, b'{"messages":' + deep + b"}", None)
    yield refused("depth", COMPLETIONS, with_prompt(b"[" * 100 + b"]" * 100), "prompt")
    for body in (
        b"{",
        b"nonsense",
        b"{'model': 1}",
        b'{"model":}',
        b'{"a":1}x',
        b'{"a":1,}',
        b"\xef\xbb\xbf{}",
        b"<a/>",
    ):
        yield refused("no JSON", CHAT, body, None)


def cut_off(number: int) -> list[Attack]:
    """A body that is cut somewhere, with the length that it then has."""
    body = json.dumps(chat(stop=["a", "b"], logit_bias={"1": 2.5}, seed=1)).encode()
    cuts = random.Random(SEED).sample(range(1, len(body)), number)
    return [refused("cut off", CHAT, body[:cut], None) for cut in cuts]


# --- the other routes -----------------------------------------------------------------------------------------


def deep(depth: int) -> object:
    """Objects in objects, as Python makes them; deeper than a parser takes it is written by hand."""
    value: object = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def responses() -> Iterator[Attack]:
    for items in ([], [{}], [[]], [None], [{"type": "message"}], [{"role": "wizard", "content": "x"}], [{"type": 5}]):
        yield refused("items", RESPONSES, response(input=items), "input")
    yield refused("items", RESPONSES, response(input=[{"role": "user", "content": "x"}] * (MAX_ITEMS + 1)), "input")
    for kind in ("computer_call", "mcp_call", "item_reference", "constructor", "", "x" * 5000):
        yield refused("items", RESPONSES, response(input=[{"type": kind}]), "input.0")
    for part in ({"type": "input_image", "image_url": "file:///etc/passwd"}, {"type": "input_file"}, {"text": "x"}, 1):
        yield refused("items", RESPONSES, response(input=[{"role": "user", "content": [part]}]), "input.0.content")
    yield refused("items", RESPONSES, response(input="x" * MAX_CONTEXT), "input")
    yield refused("items", RESPONSES, response(input="x", instructions="x" * MAX_CONTEXT), "input")
    yield refused("metadata", RESPONSES, response(metadata={str(index): "x" for index in range(1000)}), "metadata")
    yield refused("metadata", RESPONSES, response(metadata={"x": "x" * 1000}), "metadata")
    for count in (2**31, 2**63, -1, 0, MAX_CONTEXT):
        yield refused("number", RESPONSES, response(max_output_tokens=count), "max_output_tokens")
    for name in ("resp_x", "", "../x", "x" * 5000, "\0", "日本"):
        yield refused("previous", RESPONSES, response(previous_response_id=name), "previous_response_id")
    for depth in (300, 10_000):
        text = b'{"model":"%s","input":' % NAME.encode() + b'[{"a":' * depth + b"1" + b"}]" * depth + b"}"
        yield refused("depth", RESPONSES, text, None)
    yield refused("depth", RESPONSES, response(input=[deep(60)]), "input")
    yield refused("depth", RESPONSES, response(metadata=deep(60)), "metadata")
    yield refused("depth", RESPONSES, response(text={"format": deep(60)}), "text.format")
    text = json.dumps(response())[:-1] + ', "input": "again"}'
    yield refused("duplicate key", RESPONSES, text.encode(), "input")
    body = json.dumps(response(metadata={"a": "b"}, stream=True)).encode()
    for cut in random.Random(SEED).sample(range(1, len(body)), 10):
        yield refused("cut off", RESPONSES, body[:cut], None)


def stored() -> Iterator[Attack]:
    """Of responses that nobody made."""
    for name in ("resp_x", "%00", "..", "%2e%2e", "x" * 5000, "%F0%9F%99%82"):
        for method in ("GET", "DELETE"):
            data = f"{method} {RESPONSES}/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            yield Attack("stored", data, param="response_id", status=404)
    for method in ("PUT", "POST", "PATCH"):
        data = f"{method} {RESPONSES}/x HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        yield Attack("stored", data, status=405)


def token_routes() -> Iterator[Attack]:
    yield refused("tokenize", TOKENIZE, {}, "prompt")
    yield refused("tokenize", TOKENIZE, {"prompt": "x", "messages": chat()["messages"]}, "messages")
    yield refused("tokenize", TOKENIZE, {"prompt": "x", "chat_template": "{{ 1/0 }}"}, "chat_template")
    yield refused("tokenize", TOKENIZE, {"model": "other", "prompt": "x"}, "model", 404)
    yield refused("depth", TOKENIZE, b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}", None)
    yield refused("depth", DETOKENIZE, b'{"tokens":' + b"[" * 10_000, None)
    for tokens in ([VOCAB], [2**31], [2**63], [-1], [1.0], [True], [[1]], ["1"], [None]):
        yield refused("detokenize", DETOKENIZE, {"tokens": tokens}, "tokens")
    yield refused("number", DETOKENIZE, b'{"tokens":[' + b"1" * 5000 + b"]}", None)


def floods() -> Iterator[Attack]:
    """Heads without an end, and bodies that stay away, on each route that takes a body."""
    many = [f"x-{index}: {'y' * 20}" for index in range(6_000)]
    for path in (CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE):
        yield broken("header flood", raw(path, *many))
        yield broken("header flood", raw(path, "Cookie: " + "a=b; " * 40_000))
        yield broken("body never complete", raw(path, "Content-Length: 50", body=b'{"model":'))
        yield broken("body never complete", raw(path, "Transfer-Encoding: chunked", body=b"9\r\n{"))
        over = b" " * (MAX_BODY_BYTES + 1)
        yield refused("too large", path, over, None, 413)


# --- HTTP -----------------------------------------------------------------------------------------------------


def routes_and_methods() -> Iterator[Attack]:
    for path in ("/", "/v1", "/v1/chat/completions/", "/v2/completions", "/%00", "/v1/../etc/passwd", "/" + "a" * 5000):
        yield refused("route", path, {}, None, 404)
    yield Attack("route", b"GET /v1/models/other HTTP/1.1\r\nHost: x\r\n\r\n", param="model", status=404)
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"):
        yield Attack("method", method + b" " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n", status=405)
    for method in (b"BREW", b"post", b"P\0ST", b"\xff", b"POST" * 100):
        yield broken("method", method + b" " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    yield broken("method", b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")


def broken(family: str, data: bytes, *, half_close: bool = False) -> Attack:
    return Attack(family, data, Outcome.BROKEN, half_close=half_close)


def lengths() -> Iterator[Attack]:
    body = json.dumps(completion()).encode()
    for length in ("-1", "abc", "1e3", "+5", "0x10", "9" * 30, "5, 5", "1 1", "١"):
        yield broken("length", raw(COMPLETIONS, f"Content-Length: {length}", body=body))
    for first, second in ((len(body), len(body)), (len(body), 5), (5, len(body))):
        yield broken(
            "two lengths", raw(COMPLETIONS, f"Content-Length: {first}", f"Content-Length: {second}", body=body)
        )
    both = ("Transfer-Encoding: chunked", f"Content-Length: {len(body)}")
    yield broken("two lengths", raw(COMPLETIONS, *both, body=body))
    for length in (0, 5, len(body) - 1):  # what follows is the next request, and none
        yield broken("length", raw(COMPLETIONS, f"Content-Length: {length}", body=body + b"\r\n\r\n"))
    for cut in range(0, len(body), 5):
        yield broken("truncated", post(COMPLETIONS, body)[: -len(body) + cut], half_close=True)


def chunks() -> Iterator[Attack]:
    for encoding in ("gzip", "chunked, gzip", "chunked;x", "chunked\0"):
        yield broken("encoding", raw(COMPLETIONS, f"Transfer-Encoding: {encoding}", body=b"5\r\nhello\r\n0\r\n\r\n"))
    for body in (
        b"zz\r\nhello\r\n", b"-1\r\nhello\r\n", b"F" * 20 + b"\r\n", b"\r\nhello\r\n", b" 5\r\nhello\r\n", b"5 5\r\n",
        b"5\r\nhelloworld\r\n", b"0x5\r\nhello\r\n", b"5\nhello\n", b"1;" + b"a" * 700_000, b"\0\r\n",
    ):  # fmt: skip
        yield broken("chunk", raw(COMPLETIONS, "Transfer-Encoding: chunked", body=body))


def too_large() -> Iterator[Attack]:
    over = b" " * (MAX_BODY_BYTES + 1)
    yield refused("too large", CHAT, over, None, 413)
    yield refused("too large", COMPLETIONS, json.dumps(completion(prompt="x" * MAX_BODY_BYTES)).encode(), None, 413)
    chunked = b"%x\r\n" % len(over) + over + b"\r\n0\r\n\r\n"
    yield Attack("too large", raw(CHAT, "Transfer-Encoding: chunked", body=chunked), status=413)
    for length in (MAX_BODY_BYTES + 1, 10**18):  # declared, and never sent
        yield Attack("too large", raw(CHAT, f"Content-Length: {length}"), status=413)
    many = b"".join(b"x-%d: y\r\n" % index for index in range(60_000))
    yield broken("head", b"GET /" + b"a" * 700_000 + b" HTTP/1.1\r\n\r\n")
    yield broken("head", b"GET / HTTP/1.1\r\n" + many)
    yield broken("head", b"GET / HTTP/1.1\r\nA: " + b"a" * 700_000)
    yield broken("head", b"GET / HTTP/1.1\r\n" + b"a" * 700_000 + b": b\r\n\r\n")
    for header in (b"no colon", b": no name", b"A : b", b"A\0: b", b"A: b\0", b"\xff: b", b" A: b"):
        yield broken("head", b"GET /health HTTP/1.1\r\n" + header + b"\r\n\r\n")


def no_http() -> Iterator[Attack]:
    hello = bytes.fromhex("16030100c8010000c40303") + bytes(range(190))
    for data in (hello, hello[:11], b"\x16\x03\x03\0\x01\0", b"\x80\x2e\x01\0\x02"):
        yield broken("TLS", data + b"\r\n\r\n")
    for data in (
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"EHLO x\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n",
    ):
        yield broken("another protocol", data)
    for version in (b"", b" HTTP/0.9", b" HTTP/2.0", b" HTTP/3", b" HTTP/1.10", b" HTTP/one", b" ICE/1.0"):
        yield broken("version", b"GET /nothing" + version + b"\r\n\r\n")
    noise = random.Random(SEED)
    for size in (1, 7, 100, 5000):
        yield broken("noise", b"\x01" + noise.randbytes(size) + b"\r\n\r\n")


def half_open() -> Iterator[Attack]:
    """The client sends no more and stays: the server's patience ends."""
    request = post(CHAT, chat())
    for part in (b"", b"P", b"\r\n", request[:20], request[:60]):
        yield broken("head never complete", part)
    head_bytes = request.index(b"\r\n\r\n") + 4
    for cut in (head_bytes, head_bytes + 1, len(request) - 1):
        yield broken("body never complete", request[:cut])
    for part in (b"", b"5\r\nhel", b"5\r\nhello\r\n", b"2\r\n{}\r\n0\r\n"):
        yield broken("body never complete", raw(CHAT, "Transfer-Encoding: chunked", body=part))


def pipelined() -> Iterator[Attack]:
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    for first in (health, post(COMPLETIONS, completion()), post(CHAT, chat(stream=True)), health * 50):
        for garbage in (b"\0\0\0\0", b"nonsense\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"):
            yield Attack("pipelined", first + garbage, Outcome.BESIDE)


def leaving() -> Iterator[Attack]:
    long = {"max_tokens": 3000, "ignore_eos": True}
    for body in (chat(), chat(**long), chat(stream=True), chat(stream=True, **long)):
        yield Attack("leaves at once", post(CHAT, body), Outcome.LEFT)
        yield Attack("leaves with another behind", post(CHAT, body) * 2, Outcome.LEFT)
    unending = response(max_output_tokens=3000, stream=True)
    yield Attack("leaves at once", post(RESPONSES, unending), Outcome.LEFT)
    for reads in (1, 200, 2_000, 20_000):
        yield Attack("leaves mid-stream", post(RESPONSES, unending), Outcome.LEFT, reads=reads)
        yield Attack("leaves mid-stream", post(CHAT, chat(stream=True, **long)), Outcome.LEFT, reads=reads)
        heavy = chat(stream=True, logprobs=True, top_logprobs=20, **long)
        yield Attack("never reads", post(CHAT, heavy), Outcome.SAT_OUT)
