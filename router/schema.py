"""Requests of the OpenAI API as this gateway takes them: POST /v1/chat/completions and POST /v1/completions.

1. A body is read from JSON as it is: true is not 1, "1" is not 1, 1.0 is not an integer, NaN is no number.
2. A field of the API that is not supported yet is taken with its neutral values and refused with any other.
3. A key that is no field is refused. Every refusal carries the path of the field.

Knows neither tokens nor the model: what depends on these is checked in `router/text.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

MAX_STOPS = 4  # the API's own limit
MAX_STOP_CHARS = 1024  # bounds the text that a stream may hold back
MAX_INT = 2**31 - 1
MAX_BIASES = 300  # of logit_bias
MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 64
MAX_CHOICES = 128  # the API's own limit
MAX_TOP_LOGPROBS = 20  # the API's own limits, of chat and of plain completions
MAX_COMPLETION_LOGPROBS = 5

StrictBool = Annotated[bool, Strict()]
StrictInt = Annotated[int, Strict(), Field(le=MAX_INT)]
StrictFloat = Annotated[float, Strict()]


class ApiModel(BaseModel):
    """Unknown keys are refused; NaN and the infinities are no numbers; error messages do not repeat the input."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def _same(left: JsonValue, right: JsonValue) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def only(*neutral: JsonValue) -> AfterValidator:
    """Take these values, which ask for nothing, and refuse all others as not supported yet."""

    def check(value: JsonValue) -> JsonValue:
        if not any(_same(value, one) for one in neutral):
            raise PydanticCustomError("not_supported", "This value is not supported yet")
        return value

    return AfterValidator(check)


Unsupported = Annotated[JsonValue, only(None)]
UnsupportedList = Annotated[JsonValue, only(None, [])]
UnsupportedFlag = Annotated[JsonValue, only(None, False)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
NoTools = Annotated[JsonValue, only(None, "none", "auto")]
OnlyOne = Annotated[StrictInt | None, only(None, 1)]


# --- messages ------------------------------------------------------------------------------------------------


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "Input should be a string or an array of text parts")
    return value


class Message(ApiModel):
    """One turn. A plain string as content is one text part."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        tuple[TextPart, ...],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
        Field(min_length=1),
    ]
    name: str | None = None
    tool_call_id: str | None = None
    refusal: Unsupported = None
    annotations: UnsupportedList = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: UnsupportedList = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


# --- what both endpoints share -------------------------------------------------------------------------------


def _as_stops(value: object) -> object:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop_type", "Input should be a string or an array of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("too_many_stops", "At most {limit} stop strings are allowed", {"limit": MAX_STOPS})
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise PydanticCustomError("stop_length", "A stop string has 1 to {limit} characters", {"limit": MAX_STOP_CHARS})
    return stops


def _as_biases(value: object) -> object:
    """The API's map from a token id, as a string, to its bias."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias_type", "Input should be a map from token ids to numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_many_biases", "At most {limit} entries are allowed", {"limit": MAX_BIASES})
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))):
            raise PydanticCustomError("logit_bias_key", "The keys are token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias_value", "A bias is a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


class StreamOptions(ApiModel):
    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = Field(default=None, description="taken, without effect")


class GenerationBody(ApiModel):
    """The fields that chat and plain completions have in common."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1)] | None = Field(default=None, description="extension; 0 and -1: off")
    seed: Annotated[int, Strict(), Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_stops, json_schema_input_type=str | list[str] | None)] = ()
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: StrictBool | None = Field(default=None, description="extension: go on to max_tokens")
    min_p: Annotated[StrictFloat, Field(ge=0, le=1)] | None = Field(default=None, description="extension")
    typical_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = Field(default=None, description="extension")
    repetition_penalty: Annotated[StrictFloat, Field(gt=0, le=10)] | None = Field(
        default=None, description="extension: above 1 discourages what occurred in prompt or answer"
    )
    min_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, description="extension: nothing ends the answer before"
    )
    stop_token_ids: (
        Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=MAX_STOP_TOKENS)] | None
    ) = Field(default=None, description="extension")
    bad_words: Annotated[tuple[BadWord, ...], Field(max_length=MAX_BAD_WORDS)] | None = Field(
        default=None, description="extension: texts that the answer never contains"
    )
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        default=None, description="extension: logprobs of the prompt's tokens, not with 'stream'"
    )
    user: str | None = Field(default=None, description="taken, without effect")
    frequency_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[int, float], BeforeValidator(_as_biases, json_schema_input_type=dict[str, float] | None)
    ] = Field(default_factory=dict)

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "Only allowed when 'stream' is true")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_with_stream(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise PydanticCustomError("prompt_logprobs", "Not available when 'stream' is true")
        return value

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


# --- the two bodies ------------------------------------------------------------------------------------------


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="the newer name of max_tokens"
    )
    metadata: dict[str, str] | None = Field(default=None, description="taken, without effect")
    safety_identifier: str | None = Field(default=None, description="taken, without effect")
    prompt_cache_key: str | None = Field(default=None, description="taken, without effect")
    audio: Unsupported = None
    function_call: NoTools = None
    functions: UnsupportedList = None
    logprobs: StrictBool | None = None
    modalities: Annotated[JsonValue, only(None, ["text"])] = None
    moderation: Unsupported = None
    parallel_tool_calls: StrictBool | None = Field(default=None, description="taken, without effect")
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Annotated[JsonValue, only(None, "none")] = None
    response_format: Annotated[JsonValue, only(None, {"type": "text"})] = None
    service_tier: Annotated[JsonValue, only(None, "auto", "default")] = None
    store: UnsupportedFlag = None
    tool_choice: NoTools = None
    tools: UnsupportedList = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    verbosity: Annotated[JsonValue, only(None, "medium")] = None
    web_search_options: Unsupported = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "Only allowed when 'logprobs' is true")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("two_limits", "'max_tokens' says otherwise; send one of the two")
        return value


def _as_prompt(value: object) -> object:
    if isinstance(value, list) and value and isinstance(value[0], (str, list)):
        if len(value) > 1:
            raise PydanticCustomError("several_prompts", "Several prompts in one request are not supported yet")
        value = value[0]
    if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
        value = tuple(value)
    if not isinstance(value, (str, tuple)):
        raise PydanticCustomError("prompt_type", "Input should be a string or an array of token ids")
    if not value:
        raise PydanticCustomError("prompt_empty", "Input should not be empty")
    return value


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_as_prompt)]
    best_of: OnlyOne = None
    echo: UnsupportedFlag = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    suffix: Annotated[JsonValue, only(None, "")] = None
