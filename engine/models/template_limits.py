"""The sandbox of chat templates, with an end to what they may do.

A template comes with a model's files and cannot be trusted to end, or to stay small. Each render has a Budget: turns of
loops and calls take from it, and no text in between may be longer than it allows. What a template itself says cannot
get around that, for the checks are put into its syntax tree, not into names that it could set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError, nodes, pass_context
from jinja2.filters import do_format
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TURNS = 100_000  # of loops, and calls: a second or two at worst, and more than thousands of messages take
MAX_CHARS = 64 * 2**20  # of one text; a body is smaller, and templates repeat it at most a few times
MAX_ARGUMENT = 100_000  # of a number given to a call or a filter: a width, an indent; as much as range may have
LONG_NUMBER = re.compile(r"[%{][^%{}]{0,16}\d{6}")  # in a format: a width beyond MAX_ARGUMENT
BUDGET = "_budget"  # the variable that holds it: one of render's, which a template can hide but not replace


@dataclass(slots=True)
class Budget:
    """What is left to one render."""

    num_turns: int = MAX_TURNS
    max_chars: int = MAX_CHARS

    def take(self) -> None:
        self.num_turns -= 1
        if self.num_turns < 0:
            raise TemplateError("the template does not come to an end")

    def check(self, num_chars: int) -> None:
        if num_chars > self.max_chars:
            raise TemplateError("the template makes too long a text")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Templates made here have to be rendered with a Budget as the variable BUDGET."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, extensions: Sequence[type]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters |= {"_turn": _turn, "_concat": _concat}
        for name in ("center", "indent", "replace", "format", "join", "wordwrap"):
            self.filters[name] = _limited(self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Checks().visit(super()._parse(source, name, filename))

    def call(__self, __context: Context, __obj: object, *args: object, **kwargs: object) -> object:
        budget = _budget_of(__context)
        budget.take()
        owner = getattr(__obj, "__self__", None)
        _check_arguments(budget, owner, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: object) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if getattr(value, "__name__", None) in ("format", "format_map") and isinstance(text, str):
            _check_format(text, ())
        return super().wrap_str_format(value)

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "+":
            _budget_of(context).check(_length(left) + _length(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            if operator == "**" and (abs(left) > MAX_ARGUMENT or right > 64):
                raise TemplateError("the template makes too large a number")
        else:
            _budget_of(context).check(_length(left) * _length(right) * max(_number(left), _number(right)))
        return super().call_binop(context, operator, left, right)


class _Checks(NodeTransformer):
    """Each turn of a loop takes from the budget; texts put together are checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        turn = nodes.Filter(nodes.Const(None), "_turn", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_concat", [], [], None, None).set_lineno(node.lineno)


def _budget_of(context: Context) -> Budget:
    budget = context.parent[BUDGET]
    assert isinstance(budget, Budget)
    return budget


@pass_context
def _turn(context: Context, _value: object) -> None:
    _budget_of(context).take()


@pass_context
def _concat(context: Context, values: list[object]) -> str:
    texts = [str(value) for value in values]
    _budget_of(context).check(sum(map(len, texts)))
    return "".join(texts)


def _limited(inner: Callable[..., object]) -> Callable[..., object]:
    """The same filter, for arguments that do not make its text grow beyond all bounds."""
    wants_state = hasattr(inner, "jinja_pass_arg")

    @pass_context
    def limited(context: Context, value: object, *args: object, **kwargs: object) -> object:
        budget = _budget_of(context)
        budget.take()
        _check_arguments(budget, value, (*args, *kwargs.values()))
        if inner is do_format:
            _check_format(str(value), args)
        state = _state_for(inner, context) if wants_state else ()
        return inner(*state, value, *args, **kwargs)

    return limited


def _state_for(inner: Callable[..., object], context: Context) -> tuple[object, ...]:
    kind = getattr(inner, "jinja_pass_arg").name  # noqa: B009 - jinja's mark of what a filter gets first
    return ({"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[kind],)


def _check_arguments(budget: Budget, value: object, arguments: Sequence[object]) -> None:
    """Any of the arguments may be put anywhere into the text."""
    if any(_number(one) > MAX_ARGUMENT for one in arguments):
        raise TemplateError("the template uses too large a number")
    if isinstance(value, str | list | tuple):
        budget.check(max(1, len(value)) * max((_length(one) for one in arguments if isinstance(one, str)), default=1))


def _check_format(text: str, arguments: Sequence[object]) -> None:
    """A text that may be a format, with widths written in it or given to it."""
    if LONG_NUMBER.search(text) or any(_number(one) > MAX_ARGUMENT for one in arguments):
        raise TemplateError("the template uses too large a number")


def _length(value: object) -> int:
    return max(1, len(value)) if isinstance(value, str | list | tuple) else 1


def _number(value: object) -> int:
    return max(1, abs(value)) if isinstance(value, int) else 1
