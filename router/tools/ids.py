"""Ids of calls: made from the request's own, so that a stream and a whole answer have the same."""

from __future__ import annotations

import hashlib

SHORT_CHARS = 9  # Mistral's templates take ids of exactly so many letters and digits


def call_id(request_id: str, choice: int, call: int) -> str:
    return f"call_{_digest(f'{request_id}.{choice}.{call}')[:24]}"


def short_id(text: str) -> str:
    """An id as Mistral's templates take it; equal ids stay equal."""
    is_short = len(text) == SHORT_CHARS and text.isascii() and text.isalnum()
    return text if is_short else _digest(text)[:SHORT_CHARS]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
