"""The fields of a chat body that have to do with calls of functions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, Strict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MAX_TOOLS = 128  # the API's own limit
MAX_CALLS = 128  # of one message
MAX_ID_CHARS = 256
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class FunctionDef(_Fields):
    """A function on offer. `parameters` is a JSON schema; with `strict` its arguments always keep to it."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: Annotated[bool, Strict()] | None = None


class Tool(_Fields):
    type: Literal["function"]
    function: FunctionDef


Tools = Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS)]


class FunctionNamed(_Fields):
    name: FunctionName


class ToolNamed(_Fields):
    type: Literal["function"]
    function: FunctionNamed


class AllowedTools(_Fields):
    mode: Literal["auto", "required"]
    tools: Annotated[tuple[ToolNamed, ...], Field(min_length=1, max_length=MAX_TOOLS)]


class ToolChoice(_Fields):
    """A plain word of the API's is a type of its own here."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: FunctionNamed | None = Field(default=None, validate_default=True)
    allowed_tools: AllowedTools | None = Field(default=None, validate_default=True)

    @field_validator("function", "allowed_tools")
    @classmethod
    def _as_the_type_says(cls, value: BaseModel | None, info: ValidationInfo) -> BaseModel | None:
        if "type" in info.data and (info.data["type"] == info.field_name) != (value is not None):
            raise PydanticCustomError("tool_choice", "Given if, and only if, 'type' is its name")
        return value


def _as_choice(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


TOOL_CHOICE_DOCS = Literal["none", "auto", "required"] | ToolChoice | None
ToolChoiceField = Annotated[ToolChoice | None, BeforeValidator(_as_choice, json_schema_input_type=TOOL_CHOICE_DOCS)]


def _as_function_call(value: object) -> object:
    """The older field: a word, or a function's name."""
    if isinstance(value, dict):
        return {"type": "function", "function": value}
    return _as_choice(value)


FUNCTION_CALL_DOCS = Literal["none", "auto"] | FunctionNamed | None
FunctionCallField = Annotated[
    ToolChoice | None, BeforeValidator(_as_function_call, json_schema_input_type=FUNCTION_CALL_DOCS)
]


class CalledFunction(_Fields):
    """As an earlier answer had it: the arguments are JSON as text, if the model wrote it well."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    arguments: str


class ToolCall(_Fields):
    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
    type: Literal["function"]
    function: CalledFunction


ToolCalls = Annotated[tuple[ToolCall, ...], Field(max_length=MAX_CALLS)]


def check_choice(choice: ToolChoice, names: tuple[str, ...]) -> None:
    """Raises PydanticCustomError for a choice among functions that are not on offer; `names` are."""
    if choice.type not in ("none", "auto") and not names:
        raise PydanticCustomError("tool_choice", "Only allowed with functions to choose from")
    if any(name not in names for name in chosen_names(choice)):
        raise PydanticCustomError("tool_choice", "It names a function that is not on offer")


def chosen_names(choice: ToolChoice) -> tuple[str, ...]:
    """The functions that it names; none if it leaves all of them open."""
    if choice.function is not None:
        return (choice.function.name,)
    allowed = choice.allowed_tools.tools if choice.allowed_tools else ()
    return tuple(tool.function.name for tool in allowed)
