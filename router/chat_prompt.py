"""A chat body in the form that chat templates take: messages, tools and the template's own variables, as plain data.

Templates know the developer by the older name, arguments of calls as objects, and the older function messages not at
all. A text that is written like a special token becomes one where the prompt is tokenised, as with all peers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from router.chat_style import ChatStyle
from router.schema import ChatBody, Message
from router.tools.formats import MARKS
from router.tools.ids import short_id
from router.tools.prompt import Record, call_in_words, result_in_words, tools_in_words, with_system_text
from router.tools.schema import Tool


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a chat template renders."""

    messages: list[Record]
    tools: list[Record] | None
    variables: dict[str, JsonValue]


def chat_prompt(body: ChatBody, style: ChatStyle) -> ChatPrompt:
    messages = list(_messages(body.messages, style))
    tools = [_record(tool) for tool in body.tool_use.offered]
    if tools and not style.shows_tools:
        messages = with_system_text(messages, tools_in_words(tools, style.tool_format))
    return ChatPrompt(messages, (tools or None) if style.shows_tools else None, _variables(body))


def _record(tool: Tool) -> Record:
    """As the client wrote it, without what only concerns us; templates expect parameters."""
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}


def _variables(body: ChatBody) -> dict[str, JsonValue]:
    """The client's own go before what the effort says."""
    effort = body.reasoning_effort
    told: dict[str, JsonValue] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        told |= {"enable_thinking": False, "thinking": False}  # as Qwen and DeepSeek call it
    return told | (body.chat_template_kwargs or {})


def _messages(messages: Iterable[Message], style: ChatStyle) -> Iterator[Record]:
    for message in messages:
        if message.role in ("tool", "function"):
            yield _result(message, style)
        elif message.tool_calls or message.function_call:
            yield _calling(message, style)
        else:
            yield _plain(message)


def _plain(message: Message) -> dict[str, object]:
    role = "system" if message.role == "developer" else message.role
    record: dict[str, object] = {"role": role, "content": message.text}
    reasoning = message.reasoning_content or message.reasoning
    return record | ({"reasoning_content": reasoning} if reasoning else {})


def _calling(message: Message, style: ChatStyle) -> Record:
    """An assistant's message with calls."""
    calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    if message.function_call is not None:
        calls.append((message.function_call.name, message.function_call.name, message.function_call.arguments))
    record = _plain(message)
    if not style.shows_calls:
        marks = MARKS[style.tool_format]
        words = [call_in_words(name, arguments, marks) for _, name, arguments in calls]
        return record | {"content": "\n".join(filter(None, [message.text, *words]))}
    shown = [
        {
            "id": _id_for(style, call_id),
            "type": "function",
            "function": {"name": name, "arguments": _arguments(arguments)},
        }
        for call_id, name, arguments in calls
    ]
    return record | {"tool_calls": shown}


def _result(message: Message, style: ChatStyle) -> Record:
    if not style.shows_calls:
        return result_in_words(message.text)
    call_id = _id_for(style, message.tool_call_id or message.name or "")
    name = {"name": message.name} if message.name else {}
    return {"role": "tool", "content": message.text, "tool_call_id": call_id} | name


def _arguments(text: str) -> object:
    """The object, as templates expect it; what a model wrote badly goes back as the text that it is."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _id_for(style: ChatStyle, call_id: str) -> str:
    """The id as the model's template takes it; equal ids stay equal."""
    return short_id(call_id) if style.has_short_ids else call_id
