"""Turns: who had the beginning of a prompt."""

from __future__ import annotations

from router.turns import CHUNK, MOST_CHUNKS, Turns

A, B, C = ("decode-0", "1"), ("prefill-0", "1"), ("decode-1", "1")
TOKENS = tuple(range(4 * CHUNK))


def test_the_next_turn_finds_who_had_the_most_of_it() -> None:
    turns = Turns()
    turns.remember("", TOKENS[: 2 * CHUNK], B)
    turns.remember("", TOKENS[: 3 * CHUNK], A)
    assert turns.find("", (*TOKENS, 1, 2), B) == A
    assert turns.find("", TOKENS[: 2 * CHUNK + 5], B) is None, "who computes it had as much"
    assert turns.find("", TOKENS, A) is None
    assert turns.find("", TOKENS, C) == A


def test_other_tokens_another_namespace_or_too_few_find_nobody() -> None:
    turns = Turns()
    turns.remember("one", TOKENS, A)
    assert turns.find("two", TOKENS, B) is None
    assert turns.find("one", TOKENS[: CHUNK - 1], B) is None
    assert turns.find("one", (5, *TOKENS), B) is None
    assert turns.find("one", (*TOKENS[:CHUNK], *TOKENS[:CHUNK]), B) == A, "as far as it is the same"


def test_the_oldest_are_forgotten() -> None:
    turns = Turns()
    turns.remember("", TOKENS[:CHUNK], A)
    for number in range(MOST_CHUNKS):
        turns.remember("", (number + 1, *TOKENS[1:CHUNK]), B)
    assert turns.find("", TOKENS[:CHUNK], C) is None
    assert turns.find("", (MOST_CHUNKS, *TOKENS[1:CHUNK]), C) == B
