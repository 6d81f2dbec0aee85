"""The terminal's side of the API: which model is served, how the cluster is, and one answer as it comes.

Every fault is an ApiError whose message can be shown as it is.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import httpx
from pydantic import TypeAdapter, ValidationError

from engine.errors import SteelyardError
from router.api import HealthView

CONNECT_S = 5.0
ANSWER_S = 660.0  # more than the default deadline of a request; the gateway ends it earlier


class ApiError(SteelyardError):
    code = "api_error"


class NotListening(ApiError):
    """Nothing answers at the address."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What goes with every question; None leaves it to the server."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class ApiClient:
    """One connection to a gateway; `transport` replaces the network in tests, `key` is an API key."""

    def __init__(self, url: str, transport: httpx.BaseTransport | None = None, key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(
            base_url=self._url, timeout=timeout, transport=transport, trust_env=False, headers=headers
        )

    def __enter__(self) -> ApiClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the first model that is served."""
        with told_faults(self._url):
            response = self._http.get("/v1/models")
            _require_ok(response)
            return str(response.json()["data"][0]["id"])

    def health(self) -> HealthView:
        """The cluster's health, also when it is not well."""
        with told_faults(self._url):
            response = self._http.get("/health", timeout=CONNECT_S)
            return TypeAdapter(HealthView).validate_json(response.content)

    def stream_chat(self, messages: list[Message], options: ChatOptions) -> Generator[str, None, None]:
        """The answer's pieces of text as they come. Closing the iterator cancels the request."""
        body: dict[str, object] = {
            "model": options.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "stream": True,
        }
        chosen = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
        body |= {name: value for name, value in chosen.items() if value is not None}
        with told_faults(self._url), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            _require_ok(response)
            for line in response.iter_lines():
                if line.startswith("data:") and (data := line.removeprefix("data:").strip()) != "[DONE]":
                    yield _text_of(data)


@contextmanager
def told_faults(url: str) -> Iterator[None]:
    """Whatever goes wrong between us and the gateway at `url`, as an ApiError."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise ApiError(f"{url} is not a URL: {error}") from error
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
        raise NotListening(f"nothing listens at {url} ({error}); is the cluster running?") from error
    except httpx.HTTPError as error:
        raise ApiError(f"{url} broke off: {error or type(error).__name__}") from error
    except (ValidationError, ValueError, LookupError, TypeError) as error:
        raise ApiError(f"{url} does not answer as a Steelyard gateway") from error


def _require_ok(response: httpx.Response) -> None:
    if response.is_error:
        response.read()
        raise ApiError(message_of(response.text) or f"HTTP {response.status_code}")


def _text_of(data: str) -> str:
    """The new text of one server-sent event. Raises ApiError for an error that comes in the midst of an answer."""
    if fault := message_of(data):
        raise ApiError(fault)
    choices = json.loads(data)["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""


def message_of(text: str) -> str | None:
    """The message of an OpenAI-format error."""
    try:
        error = json.loads(text).get("error")
    except (ValueError, AttributeError):
        return None
    return str(error.get("message", error)) if isinstance(error, dict) else None
