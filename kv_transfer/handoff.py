"""The hand-off record: all that is not in blocks and must cross from worker to worker, in named parts.

Encoded as msgpack: [version, [[name, required, value], ...]]. A reader refuses an unknown required part and drops
an unknown optional one, so that a newer producer may add hints but never meaning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import cast

import msgpack
from pydantic import TypeAdapter

from engine.errors import TransferFailed
from engine.types import Request, SamplingParams

HANDOFF_VERSION = 1


@dataclass(frozen=True, slots=True)
class HandOff:
    """A prefilled request: `request.generated_ids` ends with its first token; `computed` positions are in blocks."""

    request: Request
    computed: int
    cached_tokens: int  # of the prompt, from the producer's prefix cache
    gateway_id: str
    stages: tuple[tuple[str, float], ...] = ()  # (name, seconds) spent so far

    def encode(self) -> bytes:
        request = self.request
        parts = [
            ["request_id", True, request.request_id],
            ["epoch", True, request.epoch],
            ["prompt_ids", True, list(request.prompt_ids)],
            ["generated_ids", True, list(request.generated_ids)],
            ["sampling", True, asdict(request.sampling)],
            ["namespace", True, request.namespace],
            ["timeout_s", True, request.timeout_s],
            ["computed", True, self.computed],
            ["usage", True, {"cached_tokens": self.cached_tokens}],
            ["gateway_id", True, self.gateway_id],
            ["stages", False, [list(stage) for stage in self.stages]],
        ]
        return cast(bytes, msgpack.packb([HANDOFF_VERSION, parts]))

    @classmethod
    def decode(cls, data: bytes) -> HandOff:
        """Raises TransferFailed if the record is malformed or needs what this reader does not know."""
        try:
            version, parts = msgpack.unpackb(data)
            if version != HANDOFF_VERSION:
                raise TransferFailed(f"hand-off version {version} is unknown, {HANDOFF_VERSION} is spoken here")
            return _from_parts(_known_parts(parts))
        except TransferFailed:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException) as error:
            raise TransferFailed(f"malformed hand-off record: {error}") from error


_PARTS = {
    "request_id", "epoch", "prompt_ids", "generated_ids", "sampling", "namespace", "timeout_s", "computed", "usage",
    "gateway_id", "stages",
}  # fmt: skip
_REQUEST_PARTS = ("request_id", "epoch", "prompt_ids", "generated_ids", "sampling", "namespace", "timeout_s")
_SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}
_TYPED = TypeAdapter(HandOff)  # so that nothing of a wrong type gets past here


def _known_parts(parts: list[list[object]]) -> dict[str, object]:
    known: dict[str, object] = {}
    for name, required, value in parts:
        if name in _PARTS:
            known[str(name)] = value
        elif required:
            raise TransferFailed(f"hand-off part {name!r} is required and not known here")
    return known


def _from_parts(known: dict) -> HandOff:
    if unknown := sorted(known["sampling"].keys() - _SAMPLING_FIELDS):
        raise TransferFailed(f"hand-off sampling parameters {unknown} are not known here")
    request = {name: known[name] for name in _REQUEST_PARTS}
    handoff = _TYPED.validate_python(
        {
            "request": request, "computed": known["computed"], "cached_tokens": known["usage"]["cached_tokens"],
            "gateway_id": known["gateway_id"], "stages": known.get("stages", ()),
        }
    )  # fmt: skip
    if not 0 <= handoff.computed < handoff.request.num_tokens:
        raise TransferFailed(f"{handoff.computed} positions cannot be computed of {handoff.request.num_tokens} tokens")
    return handoff
