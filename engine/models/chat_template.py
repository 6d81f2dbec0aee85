"""ChatTemplate: a checkpoint's own Jinja template, run in a sandbox.

The template comes from outside, so it runs in Jinja's immutable sandbox, sees plain data only, and ends
(template_limits.py). The environment is
the one that Hugging Face documents for chat templates: trimmed blocks, `break` and `continue`, `raise_exception`,
`strftime_now`, a `tojson` that does not escape HTML, and `{% generation %}` blocks, which render as their content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from engine.errors import InvalidRequest, ModelError
from engine.models.template_limits import BUDGET, Budget, LimitedEnvironment

FAULTS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError,
)  # fmt: skip


class ChatTemplate:
    """Renders messages to a prompt. Compiled once; it keeps nothing between calls."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables such as eos_token. Raises ModelError if `source` is malformed."""
        self.source = source
        self._variables = dict(special_tokens)
        environment = _environment()
        try:
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template is malformed: {error}", param="chat_template") from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt's text; `variables` are the template's own, such as enable_thinking. Raises InvalidRequest when
        the template refuses the messages, cannot use them, or does not come to an end."""
        budget = Budget()
        given = {
            **(variables or {}),
            **self._variables,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            BUDGET: budget,
        }
        try:
            pieces: list[str] = []
            num_chars = 0
            for piece in self._template.generate(given):
                num_chars += len(piece)
                budget.check(num_chars)
                pieces.append(piece)
            return "".join(pieces)
        except FAULTS as error:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
