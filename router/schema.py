"""Requests of the OpenAI API as this gateway takes them: POST /v1/chat/completions and POST /v1/completions.

1. A body is read from JSON as it is: true is not 1, "1" is not 1, 1.0 is not an integer, NaN is no number.
2. A field of the API that is not supported yet is taken with its neutral values and refused with any other.
3. A key that is no field is refused. Every refusal carries the path of the field.

Knows neither tokens nor the model: what depends on these is checked in `router/text.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from router.structured import ResponseFormat, StructuredOutputs
from router.tools.schema import (
    MAX_TOOLS,
    CalledFunction,
    FunctionCallField,
    FunctionDef,
    Tool,
    ToolCalls,
    ToolChoice,
    ToolChoiceField,
    Tools,
    check_choice,
)
from router.tools.use import ToolUse, tool_use

MAX_STOPS = 4  # the API's own limit
MAX_STOP_CHARS = 1024  # bounds the text that a stream may hold back
MAX_INT = 2**31 - 1
MAX_BIASES = 300  # of logit_bias
MAX_STOP_TOKENS = 64
MAX_BAD_WORDS = 64
MAX_CHOICES = 128  # the API's own limit
MAX_TOP_LOGPROBS = 20  # the API's own limits, of chat and of plain completions
MAX_COMPLETION_LOGPROBS = 5
MAX_BEST_OF = 20  # the API's own limit
MAX_VARIABLES_CHARS = 4096  # of chat_template_kwargs, as JSON
RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "reasoning_effort")

StrictBool = Annotated[bool, Strict()]
StrictInt = Annotated[int, Strict(), Field(le=MAX_INT)]
StrictFloat = Annotated[float, Strict()]


class ApiModel(BaseModel):
    """Unknown keys are refused; NaN and the infinities are no numbers; error messages do not repeat the input."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def _same(left: JsonValue, right: JsonValue) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


@dataclass(frozen=True, slots=True)
class Only:
    """Says so in the schema, too."""

    neutral: tuple[JsonValue, ...]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": list(self.neutral), "description": "others are not supported yet"}

    def _check(self, value: JsonValue) -> JsonValue:
        if not any(_same(value, one) for one in self.neutral):
            raise PydanticCustomError("not_supported", "This value is not supported yet")
        return value


def only(*neutral: JsonValue) -> Only:
    """Take these values, which ask for nothing, and refuse all others as not supported yet."""
    return Only(neutral)


Unsupported = Annotated[JsonValue, only(None)]
UnsupportedList = Annotated[JsonValue, only(None, [])]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


# --- messages ------------------------------------------------------------------------------------------------


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


TextParts = Annotated[list[TextPart], Field(min_length=1)]


def _as_parts(value: object) -> object:
    if value is None or value == ():
        return []
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "Input should be a string or an array of text parts")
    if not value:
        raise PydanticCustomError("content_empty", "An array of text parts has at least one")
    return value


class Message(ApiModel):
    """One turn. A plain string as content is one text part; an assistant's may be missing beside calls."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: str | None = Field(default=None, validate_default=True)
    tool_call_id: str | None = Field(default=None, validate_default=True)
    tool_calls: ToolCalls | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = Field(default=None, description="extension: an earlier answer's")
    reasoning: str | None = Field(default=None, description="the same by its other name")
    refusal: Unsupported = None
    annotations: UnsupportedList = None
    audio: Unsupported = None
    content: Annotated[
        tuple[TextPart, ...],
        BeforeValidator(_as_parts, json_schema_input_type=Union[str, TextParts, None]),  # noqa: UP007
    ] = Field(default=(), validate_default=True)

    @field_validator("tool_call_id", "name")
    @classmethod
    def _named_by_role(cls, value: str | None, info: ValidationInfo) -> str | None:
        owner = {"tool_call_id": "tool", "name": "function"}[str(info.field_name)]
        if value is None and info.data.get("role") == owner:
            raise PydanticCustomError("missing", "This field is required")
        return value

    @field_validator("tool_calls", "function_call", "reasoning_content", "reasoning")
    @classmethod
    def _only_an_assistant_s(cls, value: object, info: ValidationInfo) -> object:
        if value and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("role", "Only an assistant's message has it")
        return value

    @field_validator("content")
    @classmethod
    def _says_something(cls, value: tuple[TextPart, ...], info: ValidationInfo) -> tuple[TextPart, ...]:
        instead = ("tool_calls", "function_call", "reasoning_content", "reasoning")
        if not value and not any(info.data.get(field) for field in instead):
            raise PydanticCustomError("missing", "This field is required")
        return value

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
    continuous_usage_stats: StrictBool | None = Field(default=None, description="extension: usage in every chunk")
    include_obfuscation: StrictBool | None = Field(default=None, description="taken, without effect")


class GenerationBody(ApiModel):
    """The fields that chat and plain completions have in common."""

    model: Annotated[str, Field(min_length=1)]
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
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="extension: what the answer keeps to, as response_format and more"
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
    def num_generated(self) -> int:
        """Answers to each prompt, of which `num_choices` are sent."""
        return self.num_choices

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_on(self) -> bool:
        """Is the usage so far in every chunk?"""
        options = self.stream_options
        return options is not None and bool(options.include_usage and options.continuous_usage_stats)


def _as_variables(value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
    """The template's own variables only, and not too much of them."""
    for name in value or ():
        if not name.isidentifier() or name.startswith("_") or name in RESERVED_VARIABLES:
            raise PydanticCustomError("template_variable", "It names what is no variable of the template's own")
    if len(json.dumps(value)) > MAX_VARIABLES_CHARS:
        raise PydanticCustomError(
            "template_variables", "At most {limit} characters of JSON are allowed", {"limit": MAX_VARIABLES_CHARS}
        )
    return value


# --- the two bodies ------------------------------------------------------------------------------------------


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="the newer name of max_tokens"
    )
    metadata: dict[str, str] | None = Field(default=None, description="taken, without effect")
    safety_identifier: str | None = Field(default=None, description="taken, without effect")
    prompt_cache_key: str | None = Field(default=None, description="taken, without effect")
    audio: Unsupported = None
    logprobs: StrictBool | None = None
    modalities: Annotated[JsonValue, only(None, ["text"])] = None
    moderation: Unsupported = None
    tools: Tools | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: StrictBool | None = Field(default=None, description="false: one call at most")
    functions: Annotated[tuple[FunctionDef, ...], Field(max_length=MAX_TOOLS)] | None = Field(
        default=None, description="the older form of tools"
    )
    function_call: FunctionCallField = Field(default=None, description="the older form of tool_choice")
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="the chat template is told"
    )
    chat_template_kwargs: Annotated[dict[str, JsonValue] | None, AfterValidator(_as_variables)] = Field(
        default=None, description="extension: variables of the chat template, such as enable_thinking"
    )
    response_format: ResponseFormat | None = None
    service_tier: Annotated[JsonValue, only(None, "auto", "default")] = None
    store: StrictBool | None = Field(default=None, description="taken, without effect")
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    verbosity: Annotated[JsonValue, only(None, "medium")] = None
    web_search_options: Unsupported = None

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "Only allowed when 'logprobs' is true")
        return value

    @field_validator("tools", "functions")
    @classmethod
    def _with_names_of_their_own(cls, value: tuple[Tool | FunctionDef, ...] | None, info: ValidationInfo) -> object:
        names = [one.function.name if isinstance(one, Tool) else one.name for one in value or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("two_names", "Two functions have the same name")
        if value and info.data.get("tools"):
            raise PydanticCustomError("two_forms", "'tools' says otherwise; send one of the two")
        return value

    @field_validator("tool_choice", "function_call")
    @classmethod
    def _among_those_on_offer(cls, value: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        is_legacy = info.field_name == "function_call"
        if value is not None:
            offered = info.data.get("functions" if is_legacy else "tools") or ()
            check_choice(value, tuple(one.name if is_legacy else one.function.name for one in offered))
        return value

    @property
    def tool_use(self) -> ToolUse:
        is_legacy = bool(self.functions)
        tools = tuple(Tool(type="function", function=one) for one in self.functions or ()) or self.tools or ()
        choice = self.function_call if is_legacy else self.tool_choice
        return tool_use(tools, choice, is_parallel=self.parallel_tool_calls is not False, is_legacy=is_legacy)

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise PydanticCustomError("two_limits", "'max_tokens' says otherwise; send one of the two")
        return value


Prompt = str | tuple[int, ...]


def as_prompts(value: object, most: int = MAX_CHOICES) -> object:
    """One prompt or several, each a text or its token ids."""
    several = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    if len(several) > most:
        raise PydanticCustomError("too_many_prompts", "At most {limit} prompts are allowed", {"limit": most})
    return tuple(map(_as_prompt, several))


def _as_prompt(value: object) -> Prompt:
    if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
        value = tuple(value)
    if not isinstance(value, (str, tuple)):
        raise PydanticCustomError("prompt_type", "Input should be a string or an array of token ids, or several")
    if not value:
        raise PydanticCustomError("prompt_empty", "Input should not be empty")
    return value


Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Several = Field(min_length=1, max_length=MAX_CHOICES)
PROMPT_DOCS = Text | Annotated[list[Text], Several] | TokenIds | Annotated[list[TokenIds], Several]


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions. `prompt` is a tuple of prompts."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(as_prompts, json_schema_input_type=PROMPT_DOCS)]
    echo: StrictBool | None = Field(default=None, description="the answer begins with the prompt")
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = Field(default=None, description="0 only with 'echo'")
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_BEST_OF)] | None = Field(
        default=None, description="so many are generated, and the 'n' likeliest sent; not with 'stream'"
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    suffix: Annotated[JsonValue, only(None, "")] = None

    @field_validator("max_tokens")
    @classmethod
    def _something_to_say(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo"):
            raise PydanticCustomError("max_tokens", "0 is only allowed when 'echo' is true")
        return value

    @field_validator("prompt")
    @classmethod
    def _bounded(cls, value: tuple[Prompt, ...], info: ValidationInfo) -> tuple[Prompt, ...]:
        if len(value) * (info.data.get("n") or 1) > MAX_CHOICES:
            raise PydanticCustomError(
                "too_many_choices", "At most {limit} answers are given to all prompts together", {"limit": MAX_CHOICES}
            )
        return value

    @field_validator("best_of")
    @classmethod
    def _of_enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        num_choices = info.data.get("n") or 1
        if value is not None and value < num_choices:
            raise PydanticCustomError("best_of", "It must not be less than 'n'")
        if value is not None and value > num_choices and info.data.get("stream"):
            raise PydanticCustomError("best_of", "Not available when 'stream' is true")
        if value is not None and value * len(info.data.get("prompt") or ()) > MAX_CHOICES:
            raise PydanticCustomError(
                "too_many_choices", "At most {limit} answers are generated for all prompts", {"limit": MAX_CHOICES}
            )
        return value

    @property
    def num_generated(self) -> int:
        """Answers to each prompt, of which `num_choices` are sent."""
        return max(self.best_of or 1, self.num_choices)
