"""Prompts of a wanted length in tokens, of real text where it is at hand."""

from __future__ import annotations

import json
from pathlib import Path

REAL = Path(__file__).parents[2] / "shared" / "data" / "prompts"
OWN = (
    "A steelyard is a balance with unequal arms. The load hangs from the short arm near the pivot, and a counterweight "
    "slides along the long one until the beam is level; the place where it comes to rest is the weight. "
)


def prompt_texts(count: int, num_chars: int) -> tuple[list[str], str]:
    """(`count` different texts of about `num_chars` characters, where they come from)."""
    questions = _real_questions()
    source = "prompts of Spec-Bench" if questions else "own text (the real prompts are not here)"
    pool = questions or [OWN]
    texts = []
    for index in range(count):
        text = f"({index}) "
        offset = 0
        while len(text) < num_chars:
            text += pool[(index * 7 + offset) % len(pool)] + "\n"
            offset += 1
        texts.append(text[:num_chars])
    return texts, source


def _real_questions() -> list[str]:
    files = sorted(REAL.rglob("question.jsonl")) if REAL.exists() else []
    lines = [line for file in files for line in file.read_text().splitlines() if line.strip()]
    turns = [json.loads(line).get("turns", []) for line in lines]
    return [turn[0] for turn in turns if turn]
