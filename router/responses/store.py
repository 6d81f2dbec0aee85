"""Responses that can be asked for again, and gone on after: in this gateway's memory, bounded, for as long as it lives.

1. `put` keeps one under its tenant and id, and lets go of the least recently used until all fit again.
2. `get` finds it, for its tenant only; 3. `delete` lets go of it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from router.responses.body import InputCall, InputCallOutput, InputItem, InputMessage, InputReasoning

ITEM_BYTES = 1024  # of an item's objects, without its text


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`reply` is its JSON; `items` are the conversation up to its end, the answer included."""

    reply: bytes
    items: tuple[InputItem, ...]

    @property
    def size_bytes(self) -> int:
        """About what it takes. Items that it shares with the response before count for both."""
        return len(self.reply) + sum(ITEM_BYTES + 4 * _num_chars(item) for item in self.items)


def _num_chars(item: InputItem) -> int:
    match item:
        case InputMessage():
            return sum(len(part.text) for part in item.content)
        case InputCallOutput():
            return sum(len(part.text) for part in item.output)
        case InputCall():
            return len(item.arguments)
        case InputReasoning():
            return sum(len(part.text) for part in item.content or ())


class ResponseStore:
    """Nothing is kept that alone is larger than `max_bytes`. `max_responses` 0: nothing is kept."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()  # the least recently used first
        self._size_bytes = 0

    def put(self, tenant: str, response_id: str, response: StoredResponse) -> None:
        self.delete(tenant, response_id)
        if response.size_bytes > self._max_bytes:
            return
        self._kept[tenant, response_id] = response
        self._size_bytes += response.size_bytes
        while len(self._kept) > self._max_responses or self._size_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._size_bytes -= oldest.size_bytes

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        found = self._kept.get((tenant, response_id))
        if found is not None:
            self._kept.move_to_end((tenant, response_id))
        return found

    def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was one."""
        found = self._kept.pop((tenant, response_id), None)
        self._size_bytes -= 0 if found is None else found.size_bytes
        return found is not None
