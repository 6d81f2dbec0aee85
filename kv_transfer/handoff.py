"""The hand-off record: all that is not in blocks and must cross from worker to worker, in named parts.

Encoded as msgpack: [version, [[name, required, value], ...]]. A reader refuses an unknown required part and drops
an unknown optional one, so that a newer producer may add hints but never meaning.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import cast

import msgpack
from pydantic import TypeAdapter

from engine.errors import TransferFailed
from engine.types import STANDARD, Key, Request, SamplingParams, Service

HANDOFF_VERSION = 3


@dataclass(frozen=True, slots=True)
class HandOff:
    """A prefilled request: `request.generated_ids` ends with its first token; `computed` positions are in blocks.

    `siblings` are the other answers to its prompt: they differ from it in name, choice and generated tokens only."""

    request: Request
    computed: int
    cached_tokens: int  # of the prompt, from the producer's prefix cache
    gateway_id: str
    stages: tuple[tuple[str, float], ...] = ()  # (name, seconds) spent so far
    siblings: tuple[Request, ...] = ()
    overlap_s: float = 0.0  # for how long frames had been leaving when the first token was sampled; 0: none had

    def encode(self) -> bytes:
        request = self.request
        parts = [
            ["request_id", True, request.request_id],
            ["epoch", True, request.epoch],
            ["prompt_ids", True, request.prompt_ids],
            ["generated_ids", True, request.generated_ids],
            ["sampling", True, {name: getattr(request.sampling, name) for name in _SAMPLING_FIELDS}],
            ["namespace", True, request.namespace],
            ["timeout_s", True, request.timeout_s],
            ["computed", True, self.computed],
            ["usage", True, {"cached_tokens": self.cached_tokens}],
            ["gateway_id", True, self.gateway_id],
            ["stages", False, [list(stage) for stage in self.stages]],
        ]
        if self.overlap_s:
            parts.append(["overlap_s", False, self.overlap_s])
        if request.service != STANDARD:
            parts.append(["service", False, list(astuple(request.service))])
        if self.siblings:
            parts.append(["siblings", True, [_sibling_part(sibling) for sibling in self.siblings]])
        return cast(bytes, msgpack.packb([HANDOFF_VERSION, parts]))

    @classmethod
    def decode(cls, data: bytes) -> HandOff:
        """Raises TransferFailed if the record is malformed or needs what this reader does not know."""
        try:
            version, parts = msgpack.unpackb(data)
            if version != HANDOFF_VERSION:
                raise TransferFailed(f"hand-off version {version} is unknown, {HANDOFF_VERSION} is spoken here")
            handoff = _from_parts(_known_parts(parts))
            handoff.encode()  # numbers that nobody can send on are refused here
            return handoff
        except TransferFailed:
            raise
        except (*_MALFORMED, msgpack.UnpackException) as error:
            raise TransferFailed(f"malformed hand-off record: {error}") from error


_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
_PARTS = {
    "request_id", "epoch", "prompt_ids", "generated_ids", "sampling", "namespace", "timeout_s", "computed", "usage",
    "gateway_id", "stages", "siblings", "overlap_s", "service",
}  # fmt: skip
_SERVICE_FIELDS = tuple([field.name for field in fields(Service)])
_REQUEST_PARTS = ("request_id", "epoch", "prompt_ids", "generated_ids", "sampling", "namespace", "timeout_s")
_SAMPLING_FIELDS = tuple([field.name for field in fields(SamplingParams)])  # in order: the record is the same each time
_TYPED = TypeAdapter(HandOff)  # so that nothing of a wrong type gets past here
_SIBLINGS = TypeAdapter(tuple[tuple[str, int, int, tuple[int, ...]], ...])


def _sibling_part(request: Request) -> list[object]:
    return [request.request_id, request.epoch, request.sampling.choice, list(request.generated_ids)]


def _known_parts(parts: list[list[object]]) -> dict[str, object]:
    known: dict[str, object] = {}
    for name, required, value in parts:
        if name in _PARTS:
            known[str(name)] = value
        elif required:
            raise TransferFailed(f"hand-off part {name!r} is required and not known here")
    return known


def _from_parts(known: dict) -> HandOff:
    if unknown := sorted(known["sampling"].keys() - set(_SAMPLING_FIELDS)):
        raise TransferFailed(f"hand-off sampling parameters {unknown} are not known here")
    request = {name: known[name] for name in _REQUEST_PARTS}
    if "service" in known:
        request["service"] = dict(zip(_SERVICE_FIELDS, known["service"], strict=True))
    handoff = _TYPED.validate_python(
        {
            "request": request, "computed": known["computed"], "cached_tokens": known["usage"]["cached_tokens"],
            "gateway_id": known["gateway_id"], "stages": known.get("stages", ()),
            "overlap_s": known.get("overlap_s", 0.0),
        }
    )  # fmt: skip
    siblings = _SIBLINGS.validate_python(known.get("siblings", ()))
    handoff = replace(handoff, siblings=tuple(_sibling(handoff.request, *part) for part in siblings))
    for request in (handoff.request, *handoff.siblings):
        if not 0 <= handoff.computed < request.num_tokens:
            raise TransferFailed(f"{handoff.computed} positions cannot be computed of {request.num_tokens} tokens")
    return handoff


def _sibling(request: Request, name: str, epoch: int, choice: int, generated_ids: tuple[int, ...]) -> Request:
    return request.sibling(Key(name, epoch), choice, generated_ids)
