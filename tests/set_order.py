"""Where a module's doings depend on the order of a set, as far as reading it can tell.

1. Find the names that hold sets, or mappings to sets: by annotation or by what is assigned, function by function; for
   attributes and functions, by name over the whole module.
2. Find what takes their elements in order: loops, comprehensions, `list(s)`, `*s`, unpacking, `s.pop()` and the like.
3. What cannot see the order is fine: sorted, set, len, any, all, min and max without a key, building another set.

It knows one module at a time: a set that another module hands over under a name without annotation is not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from enum import StrEnum

BLIND = ("sorted", "set", "frozenset", "len", "any", "all", "min", "max")  # to the order of their argument
ORDERED = ("list", "tuple", "iter", "enumerate", "zip", "map", "filter", "sum", "deque", "collections.deque")
ORDERED_METHODS = ("join", "extend", "fromkeys")
SET_METHODS = ("union", "intersection", "difference", "symmetric_difference")
SET_TYPES = ("set", "frozenset", "Set", "AbstractSet", "MutableSet", "FrozenSet")
MAP_TYPES = ("dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict")
NEVER_SETS = (ast.List, ast.ListComp, ast.Tuple, ast.Dict, ast.DictComp, ast.GeneratorExp, ast.Constant)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.DictComp | ast.GeneratorExp


class Kind(StrEnum):
    SET = "set"
    MAP = "mapping to sets"
    OTHER = "neither"


def find_unordered_iterations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, source text) of each place that takes the elements of a set in order."""
    members = _Names()
    for node in ast.walk(tree):
        members.learn_attribute(node)
    yield from _scan(tree, _Names(), members)


def _scan(scope: ast.Module | Function, outer: _Names, members: _Names) -> Iterator[tuple[int, str]]:
    """One scope with its own names, then the functions inside of it."""
    names = _Names(outer)
    if not isinstance(scope, ast.Module):
        names.learn_parameters(scope.args)
    nodes = list(_own_nodes(scope))
    for node in nodes:
        names.learn_assignment(node, members)
    blind = {id(argument) for node in nodes for argument in _blind_arguments(node)}
    for node in nodes:
        if id(node) not in blind:
            for taken in _taken_in_order(node):
                if kind_of(taken, names, members) is Kind.SET:
                    yield taken.lineno, ast.unparse(node).split("\n")[0]
        if (popped := _popped(node)) and kind_of(popped, names, members) is Kind.SET:
            yield popped.lineno, ast.unparse(node)
        if isinstance(node, Function):
            yield from _scan(node, names, members)


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a scope, classes included, without the insides of its functions."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, Function):
            yield from _own_nodes(child)


def _taken_in_order(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.For | ast.AsyncFor):
        yield node.iter
    elif isinstance(node, Comprehension):
        yield from (each.iter for each in node.generators)
    elif isinstance(node, ast.YieldFrom | ast.Starred):
        yield node.value
    elif isinstance(node, ast.Assign):
        yield from (node.value for target in node.targets if isinstance(target, ast.Tuple | ast.List))
    elif isinstance(node, ast.Call):
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if _called(node) in ORDERED or method in ORDERED_METHODS or _takes_the_first_of_equals(node):
            yield from node.args


def _blind_arguments(node: ast.AST) -> Iterator[ast.expr]:
    """Comprehensions whose order nobody sees, because of the call that they are the argument of."""
    if isinstance(node, ast.Call) and _called(node) in BLIND and not _takes_the_first_of_equals(node):
        yield from node.args[:1]


def _takes_the_first_of_equals(node: ast.Call) -> bool:
    return _called(node) in ("min", "max") and any(keyword.arg == "key" for keyword in node.keywords)


def _popped(node: ast.AST) -> ast.expr | None:
    """What `x.pop()` takes any element of."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="pop"), args=[]):
            return value
        case _:
            return None


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


# --- what holds a set -----------------------------------------------------------------------------------------


class _Names:
    """Kinds of names, seen from one scope."""

    def __init__(self, outer: _Names | None = None) -> None:
        self._kinds: dict[str, Kind] = dict(outer._kinds) if outer else {}
        self._declared: set[str] = set()

    def get(self, name: str) -> Kind:
        return self._kinds.get(name, Kind.OTHER)

    def learn_parameters(self, arguments: ast.arguments) -> None:
        for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            self._declare(each.arg, kind_of_annotation(each.annotation))

    def learn_assignment(self, node: ast.AST, members: _Names) -> None:
        """Local names; a name that is also given something that is surely no set is left alone."""
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            self._declare(node.target.id, kind_of_annotation(node.annotation))
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target.id, node.value, members)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self._assign(target.id, node.value, members)
                elif isinstance(target, ast.Tuple) and _is_asyncio_wait(node.value):  # done, pending
                    for each in target.elts:
                        if isinstance(each, ast.Name):
                            self._declare(each.id, Kind.SET)

    def learn_attribute(self, node: ast.AST) -> None:
        """Attributes and functions are known by name over the whole module."""
        if isinstance(node, Function):
            self._declare(f"{node.name}()", kind_of_annotation(node.returns))
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    self._declare(each.target.id, kind_of_annotation(each.annotation))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
            self._declare(node.target.attr, kind_of_annotation(node.annotation))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute):
                    self._assign(target.attr, node.value, self)

    def _declare(self, name: str, kind: Kind) -> None:
        if kind is not Kind.OTHER or name not in self._declared:
            self._kinds[name] = kind
        self._declared.add(name)

    def _assign(self, name: str, value: ast.expr, members: _Names) -> None:
        if name in self._declared:
            return
        kind = kind_of(value, self, members)
        if kind is not Kind.OTHER:
            self._kinds[name] = kind
        elif _is_never_a_set(value):
            self._declare(name, Kind.OTHER)


def kind_of(node: ast.expr, names: _Names, members: _Names) -> Kind:
    """What an expression is, given the kinds of names and of attributes."""

    def kind(inner: ast.expr) -> Kind:
        return kind_of(inner, names, members)

    match node:
        case ast.Set() | ast.SetComp():
            return Kind.SET
        case ast.Name(id=name):
            return names.get(name)
        case ast.Attribute(attr=name):
            return members.get(name)
        case ast.Subscript(value=value):
            return Kind.SET if kind(value) is Kind.MAP else Kind.OTHER
        case ast.IfExp(body=one, orelse=other):
            return kind(one) if kind(one) is not Kind.OTHER else kind(other)
        case ast.BoolOp(values=values):
            return next((kind(value) for value in values if kind(value) is not Kind.OTHER), Kind.OTHER)
        case ast.NamedExpr(value=value) | ast.Await(value=value):
            return kind(value)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.BitXor() | ast.Sub(), right=right):
            return Kind.SET if _is_setlike(left, kind(left)) or _is_setlike(right, kind(right)) else Kind.OTHER
        case ast.Call(func=ast.Name(id="set" | "frozenset")):
            return Kind.SET
        case ast.Call(func=ast.Name(id="defaultdict"), args=[ast.Name(id="set"), *_]):
            return Kind.MAP
        case ast.Call(func=ast.Name(id=name)):
            return members.get(f"{name}()")
        case ast.Call(func=ast.Attribute(value=value, attr="get" | "pop" | "setdefault")) if kind(value) is Kind.MAP:
            return Kind.SET
        case ast.Call(func=ast.Attribute(value=value, attr=method)):
            if method in SET_METHODS or (method == "copy" and kind(value) is Kind.SET):
                return Kind.SET
            return members.get(f"{method}()")
        case _:
            return Kind.OTHER


def _is_setlike(node: ast.expr, kind: Kind) -> bool:
    """A set, or a view of a mapping's keys, which becomes one under an operator."""
    match node:
        case ast.Call(func=ast.Attribute(attr="keys" | "items"), args=[]):
            return True
        case _:
            return kind is Kind.SET


def _is_never_a_set(node: ast.expr) -> bool:
    return isinstance(node, NEVER_SETS) or (isinstance(node, ast.Call) and _called(node) in ("sorted", "list", "tuple"))


def _is_asyncio_wait(node: ast.expr) -> bool:
    return isinstance(node, ast.Await) and isinstance(node.value, ast.Call) and _called(node.value) == "asyncio.wait"


def kind_of_annotation(node: ast.expr | None) -> Kind:
    """`set[int]`, `frozenset[int] | None`, `ClassVar[set[int]]` are sets; `dict[str, set[int]]` maps to sets."""
    match node:
        case ast.Constant(value=str(text)):
            return kind_of_annotation(ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            kinds = (kind_of_annotation(left), kind_of_annotation(right))
            return next((kind for kind in kinds if kind is not Kind.OTHER), Kind.OTHER)
        case ast.Tuple(elts=[first, *_]):  # of Annotated
            return kind_of_annotation(first)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return Kind.SET if name in SET_TYPES else Kind.OTHER
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inside):
            if name in SET_TYPES:
                return Kind.SET
            if name in MAP_TYPES and isinstance(inside, ast.Tuple) and kind_of_annotation(inside.elts[-1]) is Kind.SET:
                return Kind.MAP
            return kind_of_annotation(inside) if name in ("ClassVar", "Final", "Optional", "Annotated") else Kind.OTHER
        case _:
            return Kind.OTHER
