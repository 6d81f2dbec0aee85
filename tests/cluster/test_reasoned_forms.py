"""Answers of a model that reasons keep to a form after their reasoning, on one worker and across a hand-off.

The hand-off falls into the reasoning: what crosses is tokens, and the grammar is followed along them again. The model
has random weights. Its marks are tokens, so biases make it begin to reason, and end after some tokens.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.parity_requests import CHAT, FORMATS, FORMS, Asked
from tests.cluster.test_parity import answers
from tests.cluster.tiny_model import CHAT_TEMPLATE, EOS, NAME, write_tiny_model

OPENER, CLOSER = EOS + 1, EOS + 2
TEMPLATE = CHAT_TEMPLATE + "{% if opened %}<think>{% endif %}{# ...</think> #}"
BIASES = {str(OPENER): 100, str(CLOSER): 2}  # of the second: about 1 token in 50 is it, where it may come
MAX_TOKENS = 600
CONTENT = re.compile(r"[0-9]{2,9}(-[a-f]+)?|yes|yet|no|日本|([a-z]{1,3} ?)+|\{.*", re.DOTALL)


def asked() -> list[Asked]:
    fields = [*({"structured_outputs": form} for form in FORMS), *({"response_format": form} for form in FORMATS[:2])]
    return [
        Asked(CHAT, body(number) | form | extra)
        for number, (form, extra) in enumerate(
            (form, extra)
            for form in fields
            for extra in ({}, {"stream": True, "stream_options": {"include_usage": True}}, OPENED)
        )
    ]


OPENED: dict[str, object] = {"chat_template_kwargs": {"opened": True}}


def body(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"Number {number}"}]
    return {
        "model": NAME, "messages": messages, "seed": number, "max_tokens": MAX_TOKENS, "logit_bias": BIASES,
    }  # fmt: skip


def told(one: Asked, reply: bytes) -> tuple[str, str, str]:
    """Reasoning, content and why it ended; `reply` as test_parity puts streams together."""
    parsed: Any = json.loads(reply)
    choice = parsed[2][0][1] if one.is_streamed else parsed["choices"][0]
    message = choice["delta" if one.is_streamed else "message"]
    return message.get("reasoning") or "", message.get("content") or "", choice["finish_reason"]


@pytest.mark.slow
async def test_the_form_begins_after_the_reasoning_wherever_it_ends(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / NAME, TEMPLATE, ("<think>", "</think>"))
    requests = asked()
    alone = await answers(folder, requests, num_decode=0)
    assert await answers(folder, requests, num_decode=1) == alone
    found = [told(one, reply) for one, reply in zip(requests, alone, strict=True)]
    assert sum(bool(reasoning) for reasoning, _, _ in found) > len(found) * 3 // 4
    ended = [content for _, content, reason in found if reason == "stop"]
    assert len(ended) > len(found) // 2 and all(CONTENT.fullmatch(content) for content in ended), ended
    assert not any(CONTENT.fullmatch(reasoning) for reasoning, _, _ in found if reasoning)
