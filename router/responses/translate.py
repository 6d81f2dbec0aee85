"""A body of the Responses API as a body of chat: the same generation, asked for in other words.

1. Instructions, and the items of the conversation, become messages, in this order.
2. What chat finds wrong with its body is told with the name that the field has here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from engine.errors import SteelyardError
from router.errors import refusal
from router.responses.body import (
    LOGPROBS,
    ChosenFunction,
    FunctionTool,
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputReasoning,
    InputText,
    ReasoningText,
    ResponseBody,
    SchemaFormat,
    TextOptions,
)
from router.responses.records import OutputCall, OutputItem, OutputMessage, OutputReasoning
from router.schema import ChatBody

Fields = dict[str, object]  # of a JSON object, on its way into ChatBody

# The first that begins a path is taken; what follows it stays.
NAMES = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "logprobs": "include",
}


def chat_body(body: ResponseBody, items: Sequence[InputItem]) -> ChatBody:
    """What to generate after these items. InvalidRequest names the field of `body` that chat refuses."""
    fields = _chat_fields(body, items)
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        raise renamed(refusal(error, fields)) from None


def input_items(output: Sequence[OutputItem]) -> tuple[InputItem, ...]:
    """What was answered, as it goes into the next turn."""
    return tuple(map(_input_item, output))


def _input_item(item: OutputItem) -> InputItem:
    match item:
        case OutputMessage():
            parts = tuple(InputText(type="output_text", text=part.text) for part in item.content)
            return InputMessage(role="assistant", content=parts)
        case OutputCall():
            return InputCall(type="function_call", call_id=item.call_id, name=item.name, arguments=item.arguments)
        case OutputReasoning():
            parts = tuple(ReasoningText(type="reasoning_text", text=part.text) for part in item.content)
            return InputReasoning(type="reasoning", content=parts)


def renamed(error: SteelyardError) -> SteelyardError:
    """The same error about a field of chat, with the name that it has in the Responses API."""
    if error.param is None:
        return error
    name = _name_of(error.param)
    message = error.message.replace(f"'{error.param}'", f"'{name}'", 1)
    return type(error)(message, param=name, retry_after_s=error.retry_after_s)


def _name_of(param: str) -> str:
    if param == "messages" or param.startswith("messages."):
        return "input"  # messages and items are not counted alike
    for theirs, ours in NAMES.items():
        if param == theirs or param.startswith(theirs + "."):
            return ours + param[len(theirs) :]
    return param.replace(".function", "", 1) if param.startswith("tool") else param


def _chat_fields(body: ResponseBody, items: Sequence[InputItem]) -> Fields:
    has_logprobs = LOGPROBS in (body.include or ())
    asked: Fields = {
        "model": body.model,
        "messages": list(messages_of(body.instructions, items)),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": has_logprobs or None,
        "top_logprobs": body.top_logprobs if has_logprobs else None,
        "stream": body.stream,
        "response_format": _format(body.text),
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def messages_of(instructions: str | None, items: Sequence[InputItem]) -> Iterator[Fields]:
    """What the assistant thought, said and called, in this order, is one message."""
    if instructions:
        yield {"role": "system", "content": instructions}
    said: Fields = {}  # by the assistant, and still open
    for item in items:
        if said and not _goes_on(said, item):
            yield said
            said = {}
        match item:
            case InputReasoning():
                text = "".join(part.text for part in item.content or ())
                said = {"role": "assistant", "content": None, "reasoning_content": text} if text else {}
            case InputCall():
                calls = said.get("tool_calls", ())
                assert isinstance(calls, tuple)
                said = {"role": "assistant", "content": None, **said, "tool_calls": (*calls, _call(item))}
            case InputMessage(role="assistant"):
                said |= {"role": "assistant", "content": _parts(item)}
            case InputMessage():
                yield {"role": item.role, "content": _parts(item)}
            case InputCallOutput():
                text = "\n".join(part.text for part in item.output)
                yield {"role": "tool", "tool_call_id": item.call_id, "content": text}
    if said:
        yield said


def _goes_on(said: Fields, item: InputItem) -> bool:
    """Does the item belong to the message that the assistant has begun?"""
    match item:
        case InputCall():
            return True
        case InputMessage(role="assistant"):
            return said["content"] is None and "tool_calls" not in said
        case _:
            return False


def _call(item: InputCall) -> Fields:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _parts(item: InputMessage) -> list[Fields]:
    return [{"type": "text", "text": part.text} for part in item.content]


def _format(text: TextOptions | None) -> Fields | None:
    if text is None or text.format is None:
        return None
    if isinstance(text.format, SchemaFormat):
        schema = text.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": schema}
    return {"type": text.format.type}


def _tool(tool: FunctionTool) -> Fields:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}


def _choice(choice: str | ChosenFunction | None) -> object:
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice
