"""Requests of the Responses API as this gateway takes them: POST /v1/responses.

As in `router/schema.py`: JSON as it is, neutral values of what is not supported yet, no unknown keys; what only chat
can judge (tools, formats, the model) is judged there, after `translate.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, JsonValue, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from router.schema import (
    MAX_TOP_LOGPROBS,
    ApiModel,
    StrictBool,
    StrictFloat,
    StrictInt,
    Unsupported,
    UnsupportedList,
    only,
)

UnsupportedFlag = Annotated[JsonValue, only(None, False)]
MAX_METADATA = 16  # the API's own limits: pairs, and characters of a key and of a value
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MAX_ITEMS = 4096  # of one input
LOGPROBS = "message.output_text.logprobs"

Status = Literal["in_progress", "completed", "incomplete"]


# --- items of the input --------------------------------------------------------------------------------------


class InputText(ApiModel):
    """A part of a message. `annotations` and `logprobs` come with an answer that is sent back."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: UnsupportedList = None
    logprobs: list[JsonValue] | None = Field(default=None, description="taken, without effect")


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("content_type", "Input should be a string or an array of text parts")
    return value


Parts = Annotated[
    tuple[InputText, ...],
    BeforeValidator(_as_parts, json_schema_input_type=str | Annotated[list[InputText], Field(min_length=1)]),
    Field(min_length=1),
]


class InputMessage(ApiModel):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    id: str | None = None
    status: Status | None = None
    phase: Unsupported = None


class InputCall(ApiModel):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    arguments: str
    id: str | None = None
    status: Status | None = None
    caller: Unsupported = None
    namespace: Unsupported = None


class InputCallOutput(ApiModel):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1)]
    output: Parts
    id: str | None = None
    status: Status | None = None
    caller: Unsupported = None
    name: str | None = Field(default=None, description="taken, without effect")
    namespace: Unsupported = None


class ReasoningText(ApiModel):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(ApiModel):
    """Reasoning of an earlier answer, as it came. Whether the model gets to see it is its chat template's choice."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: UnsupportedList = None
    content: tuple[ReasoningText, ...] | None = None
    encrypted_content: Unsupported = None
    status: Status | None = None


def _kind_of(item: object) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind_of,
        custom_error_type="not_supported",
        custom_error_message="The items are message, function_call, function_call_output and reasoning",
    ),
]


Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]


def _as_items(value: object) -> object:
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "Input should be a string or an array of items")
    return value


# --- what is asked for ---------------------------------------------------------------------------------------


class PlainFormat(ApiModel):
    type: Literal["text", "json_object"]


class SchemaFormat(ApiModel):
    type: Literal["json_schema"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[dict[str, JsonValue], Field(alias="schema")]
    description: str | None = None
    strict: StrictBool | None = None


class TextOptions(ApiModel):
    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Annotated[JsonValue, only(None, "medium")] = None


class FunctionTool(ApiModel):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: StrictBool | None = None
    allowed_callers: Unsupported = None
    defer_loading: UnsupportedFlag = None
    output_schema: Unsupported = None

    @property
    def as_shown(self) -> dict[str, JsonValue]:
        """As the answer says it back."""
        shown = self.model_dump(include={"type", "name", "parameters", "strict"})
        return shown | ({} if self.description is None else {"description": self.description})


class ChosenFunction(ApiModel):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1)]


class ReasoningOptions(ApiModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Unsupported = None
    generate_summary: Unsupported = None
    mode: Unsupported = None
    context: Annotated[JsonValue, only(None, "auto")] = None


class ResponseStreamOptions(ApiModel):
    include_obfuscation: StrictBool | None = Field(default=None, description="taken, without effect")


class ResponseBody(ApiModel):
    """Body of POST /v1/responses."""

    model: Annotated[str, Field(min_length=1)]
    input: Annotated[
        tuple[InputItem, ...],
        BeforeValidator(_as_items, json_schema_input_type=str | Items),
        Field(min_length=1, max_length=MAX_ITEMS),
    ]
    instructions: str | None = Field(default=None, description="a system message before all others; not kept")
    previous_response_id: str | None = Field(default=None, description="goes on after a response that is kept here")
    store: StrictBool | None = Field(default=None, description="false: the answer is not kept")
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    include: tuple[Literal["message.output_text.logprobs"], ...] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        default=None, description=f"only where 'include' names {LOGPROBS}"
    )
    stream: StrictBool | None = None
    stream_options: ResponseStreamOptions | None = Field(default=None, description="only where 'stream' is true")
    text: TextOptions | None = None
    tools: tuple[FunctionTool, ...] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    truncation: Annotated[JsonValue, only(None, "disabled")] = None
    user: str | None = Field(default=None, description="taken, without effect")
    safety_identifier: str | None = Field(default=None, description="taken, without effect")
    prompt_cache_key: str | None = Field(default=None, description="taken, without effect")
    service_tier: Annotated[JsonValue, only(None, "auto", "default")] = None
    background: UnsupportedFlag = None
    context_management: Unsupported = None
    conversation: Unsupported = None
    max_tool_calls: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None

    @field_validator("metadata")
    @classmethod
    def _bounded(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = (value or {}).items()
        is_long = any(len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE for key, text in pairs)
        if is_long or len(pairs) > MAX_METADATA:
            raise PydanticCustomError(
                "metadata",
                "At most {num_pairs} pairs, of {num_key} and {num_value} characters",
                {"num_pairs": MAX_METADATA, "num_key": MAX_METADATA_KEY, "num_value": MAX_METADATA_VALUE},
            )
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and LOGPROBS not in (info.data.get("include") or ()):
            raise PydanticCustomError("top_logprobs", "Only allowed when 'include' names {name}", {"name": LOGPROBS})
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "Only allowed when 'stream' is true")
        return value

    @property
    def is_kept(self) -> bool:
        return self.store is not False

    @property
    def chosen_tool(self) -> JsonValue:
        """As the answer says it back."""
        choice = self.tool_choice
        return choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto"
