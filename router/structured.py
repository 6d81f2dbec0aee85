"""Fields of a request that say what form its answer has. What they become is router/grammar.py's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, model_validator
from pydantic_core import PydanticCustomError

MAX_CHOICE_TEXTS = 1000
MAX_TEXT_CHARS = 2**14


class _Form(BaseModel):
    """As router.schema.ApiModel."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True, serialize_by_alias=True
    )


class TextFormat(_Form):
    type: Literal["text"]


class JsonObjectFormat(_Form):
    type: Literal["json_object"]


class NamedSchema(_Form):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = Field(default=None, description="taken, without effect")
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema", description="none: any object")
    strict: Annotated[bool, Strict()] | None = Field(
        default=None, description="taken; the answer keeps to the schema in any case"
    )


class JsonSchemaFormat(_Form):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(_Form):
    """vLLM's field: exactly one of these."""

    json_: dict[str, JsonValue] | None = Field(default=None, alias="json", description="a JSON schema")
    regex: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] | None = None
    choice: (
        Annotated[
            tuple[Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)], ...],
            Field(min_length=1, max_length=MAX_CHOICE_TEXTS),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] | None = Field(
        default=None, description="Lark, as llguidance reads it"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> StructuredOutputs:
        given = [one for one in (self.json_, self.regex, self.choice, self.grammar) if one is not None]
        if len(given) != 1:
            raise PydanticCustomError("structured_outputs", "One of json, regex, choice and grammar is wanted")
        return self
