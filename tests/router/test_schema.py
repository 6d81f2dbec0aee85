"""Request bodies: what is taken. (What is refused, and with which field, is in test_gateway_errors.py.)"""

from __future__ import annotations

import json

import pytest

from router.schema import ChatBody, CompletionBody
from tests.router.fakes import chat, completion

NEUTRAL_CHAT = {
    "audio": [None],
    "frequency_penalty": [None, 0, 0.0],
    "function_call": [None, "none", "auto"],
    "functions": [None, []],
    "ignore_eos": [None, True, False],
    "logit_bias": [None, {}],
    "logprobs": [None, False],
    "max_completion_tokens": [None, 1],
    "max_tokens": [None, 1],
    "metadata": [None, {"a": "b"}],
    "modalities": [None, ["text"]],
    "n": [None, 1],
    "parallel_tool_calls": [None, True, False],
    "prediction": [None],
    "presence_penalty": [None, 0],
    "prompt_cache_key": [None, "k"],
    "reasoning_effort": [None, "none"],
    "response_format": [None, {"type": "text"}, {"type": "json_object"}],
    "structured_outputs": [None, {"regex": "a"}],
    "safety_identifier": [None, "s"],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "service_tier": [None, "auto", "default"],
    "stop": [None, "x", ["x"], ["a", "b", "c", "d"], []],
    "store": [None, False],
    "stream": [None, True, False],
    "stream_options": [None],
    "temperature": [None, 0, 0.0, 1, 2, 2.0],
    "tool_choice": [None, "none", "auto"],
    "tools": [None, []],
    "top_k": [None, -1, 0, 50],
    "top_logprobs": [None, 0],
    "top_p": [None, 1, 1.0, 0.001],
    "user": [None, "u"],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
}
NEUTRAL_COMPLETION = {
    "best_of": [None, 1],
    "echo": [None, False],
    "logprobs": [None],
    "suffix": [None, ""],
    "prompt": ["x", [1, 2], ["x"], [[1, 2]]],
}


@pytest.mark.parametrize(("field", "values"), NEUTRAL_CHAT.items())
def test_neutral_values_are_taken_in_chat(field: str, values: list[object]) -> None:
    for value in values:
        ChatBody.model_validate_json(json.dumps(chat(**{field: value})))


@pytest.mark.parametrize(("field", "values"), NEUTRAL_COMPLETION.items())
def test_neutral_values_are_taken_in_completions(field: str, values: list[object]) -> None:
    for value in values:
        CompletionBody.model_validate_json(json.dumps(completion() | {field: value}))


def test_every_role_is_taken() -> None:
    messages = [{"role": role, "content": "x"} for role in ("system", "developer", "user", "assistant")]
    messages.append({"role": "tool", "content": "x", "tool_call_id": "c1"})
    body = ChatBody.model_validate_json(json.dumps(chat() | {"messages": messages}))
    assert [message.text for message in body.messages] == ["x"] * 5


def test_an_assistants_own_reply_can_be_sent_back() -> None:
    reply = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "audio": None}
    reply |= {"function_call": None, "tool_calls": None}
    ChatBody.model_validate_json(json.dumps(chat() | {"messages": [reply]}))


def test_stop_strings_are_a_tuple() -> None:
    assert ChatBody.model_validate(chat(stop="x")).stop == ("x",)
    assert ChatBody.model_validate(chat(stop=None)).stop == ()
