"""Quota: what one tenant has used of its limits, in token buckets over a clock that comes from outside.

1. `admit` charges a request and its prompt's tokens, or refuses with the time after which it would not.
2. `charge` takes generated tokens as they come. They may take the bucket below zero: nobody knows how many there
   will be, and reserving the most would refuse what fits. Until the debt is paid nothing is admitted.
3. `leave` ends a live request.

A bucket holds a minute's worth and fills evenly. Each of N gateways has an Nth of everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.errors import InvalidRequest, Overloaded
from router.tenants import Limits

MINUTE_S = 60.0
LIVE_RETRY_S = 1.0  # when a live request will end is not known here


@dataclass(frozen=True, slots=True)
class Bucket:
    """`level` at `time_s`; it fills by `size` a minute, up to `size`."""

    size: float
    level: float
    time_s: float

    def at(self, now_s: float) -> Bucket:
        gained = max(0.0, now_s - self.time_s) * self.size / MINUTE_S
        return replace(self, level=min(self.size, self.level + gained), time_s=max(now_s, self.time_s))

    def wait_s(self, amount: float) -> float:
        """How long until it holds so much; 0 if it does."""
        return max(0.0, amount - self.level) * MINUTE_S / self.size

    def less(self, amount: float) -> Bucket:
        return replace(self, level=self.level - amount)


class Quota:
    """One tenant's, at one gateway."""

    def __init__(self, limits: Limits, now_s: float, num_gateways: int = 1) -> None:
        self.limits = limits
        self._requests = _bucket(limits.requests_per_minute, now_s, num_gateways)
        self._tokens = _bucket(limits.tokens_per_minute, now_s, num_gateways)
        most = limits.max_live_requests
        self._max_live = None if most is None else max(1, most // num_gateways)
        self._live: dict[object, int] = {}  # by ticket: prompt tokens

    @property
    def num_live(self) -> int:
        return len(self._live)

    def admit(self, ticket: object, num_prompt_tokens: int, now_s: float) -> None:
        """Overloaded, with the time until it would be admitted; InvalidRequest if it never would be. Charges all or
        nothing."""
        self._fill(now_s)
        if self._tokens is not None and num_prompt_tokens > self._tokens.size:
            raise InvalidRequest(
                f"The prompt has {num_prompt_tokens} tokens; this tenant may use {self._tokens.size:.0f} a minute",
                param="messages",
            )
        if self._max_live is not None and len(self._live) >= self._max_live:
            raise Overloaded(f"This tenant has {self._max_live} live requests already", retry_after_s=LIVE_RETRY_S)
        if self._requests is not None and (wait_s := self._requests.wait_s(1)) > 0:
            raise Overloaded("This tenant has reached its requests per minute", retry_after_s=wait_s)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(num_prompt_tokens)) > 0:
            raise Overloaded("This tenant has reached its tokens per minute", retry_after_s=wait_s)
        self._requests = self._requests and self._requests.less(1)
        self._live[ticket] = num_prompt_tokens
        self.charge(num_prompt_tokens, now_s)

    def charge(self, num_tokens: int, now_s: float) -> None:
        if self._tokens is not None:
            self._tokens = self._tokens.at(now_s).less(num_tokens)

    def leave(self, ticket: object) -> None:
        self._live.pop(ticket, None)

    def headers(self, now_s: float) -> dict[str, str]:
        """OpenAI's x-ratelimit-*: the limit, what remains, and when it is whole again."""
        self._fill(now_s)
        named = (("requests", self._requests), ("tokens", self._tokens))
        return {name: value for kind, bucket in named if bucket for name, value in _headers(kind, bucket).items()}

    def _fill(self, now_s: float) -> None:
        self._requests = self._requests and self._requests.at(now_s)
        self._tokens = self._tokens and self._tokens.at(now_s)


def _bucket(per_minute: int | None, now_s: float, num_gateways: int) -> Bucket | None:
    if per_minute is None:
        return None
    size = max(1.0, per_minute / num_gateways)
    return Bucket(size, size, now_s)


def _headers(kind: str, bucket: Bucket) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{kind}": f"{bucket.size:.0f}",
        f"x-ratelimit-remaining-{kind}": str(max(0, int(bucket.level))),
        f"x-ratelimit-reset-{kind}": f"{bucket.wait_s(bucket.size):.3f}s",
    }
