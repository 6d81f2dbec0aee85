"""A checker of the house's rules, by reading sources: who may import whom, the clock seam, and a few bans.

1. `read_sources` parses every file of our packages under a root (the repository, or a planted tree in a test).
2. Each `find_*` below is one rule: sources in, faults out. `check` runs them all.
3. Nothing is imported or run; a rule that this reading cannot see through (a name built at run time) is not enforced.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.set_order import find_unordered_iterations

ENGINE_SIDE = ("engine", "kernels", "kv_transfer", "prefill_worker", "decode_worker")
PACKAGES = (*ENGINE_SIDE, "router", "cluster")
OURS = (*PACKAGES, "benchmarks", "tests")

NETWORK = (
    "aiohttp", "fastapi", "grpc", "http", "httpx", "requests", "socket", "socketserver", "starlette", "urllib.request",
    "urllib3", "uvicorn", "websockets",
)  # fmt: skip
IMPORTERS = ("importlib.import_module", "import_module", "__import__")
TORCH = ("torch", "triton", "safetensors.torch", "kernels")


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name. `module` is dotted and absolute; `at_load` is false in functions and under TYPE_CHECKING."""

    line: int
    module: str
    at_load: bool

    def is_of(self, names: tuple[str, ...]) -> str | None:
        """Which of the names this is, or is inside of."""
        return next((name for name in names if self.module == name or self.module.startswith(f"{name}.")), None)


@dataclass(frozen=True, slots=True)
class Source:
    path: str  # below the root, with slashes
    module: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.path.split("/")[0]


Sources = Mapping[str, Source]  # by module


def check(root: Path) -> list[Fault]:
    """Every fault under a root, in order."""
    sources = read_sources(root)
    return sorted({fault for find in RULES.values() for fault in find(sources)})


# --- reading --------------------------------------------------------------------------------------------------


def read_sources(root: Path) -> Sources:
    """All files of our packages and benchmarks, without generated ones."""
    paths = sorted(path for name in (*PACKAGES, "benchmarks") for path in (root / name).rglob("*.py"))
    paths = [path for path in paths if not fnmatch(path.name, "*_pb2*")]
    modules = {_module_name(path.relative_to(root)): path for path in paths}
    sources = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        imports = tuple(_imports(tree, package, frozenset(modules)))
        sources[module] = Source(path.relative_to(root).as_posix(), module, tree, imports)
    return sources


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, package: str, modules: frozenset[str]) -> Iterator[Import]:
    for node, at_load in _statements(tree.body, at_load=True):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, at_load)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, package)
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                is_module = name in modules or origin.split(".")[0] not in OURS
                yield Import(node.lineno, name if is_module else origin, at_load)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            for named in node.args[:1]:
                if isinstance(named, ast.Constant):
                    yield Import(node.lineno, str(named.value), at_load)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    parts = package.split(".")
    above = parts[: len(parts) - node.level + 1] if node.level else []
    return ".".join([*above, *([node.module] if node.module else [])])


def _statements(nodes: list[ast.stmt], at_load: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, with whether they run when the module is loaded."""
    stack: list[tuple[ast.AST, bool]] = [(node, at_load) for node in reversed(nodes)]
    while stack:
        node, loads = stack.pop()
        yield node, loads
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += [(child, False) for child in node.body] + [(child, loads) for child in node.orelse]
            continue
        inner = loads and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack += [(child, inner) for child in ast.iter_child_nodes(node)]


def torch_modules(sources: Sources) -> set[str]:
    """Modules of ours that bring torch in when they are loaded, by themselves or through others of ours."""
    heavy = {name for name, source in sources.items() if any(i.at_load and i.is_of(TORCH) for i in source.imports)}
    loads = {name: _loaded_with(source) for name, source in sources.items()}
    while grown := {name for name in sources if name not in heavy and loads[name] & heavy}:
        heavy |= grown
    return heavy


def _loaded_with(source: Source) -> set[str]:
    """Names of what is loaded when a module is: its imports, and the packages above each of them and above itself."""
    names = [i.module for i in source.imports if i.at_load] + [source.module]
    above = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    return above - {source.module}


# --- who may import whom --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """What one package may import of ours, and what it may not import of others'."""

    may: tuple[str, ...] = ()
    may_torch_free: tuple[str, ...] = ()  # only those files of these packages that load no torch
    must_not: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None  # of others': nothing but this and the standard library


LAYERS = {
    "kernels": Layer(only=("torch", "triton", "numpy")),
    "engine": Layer(may=("kernels",), must_not=("ray", *NETWORK)),
    "kv_transfer": Layer(may_torch_free=("engine",), must_not=("ray",)),
    "prefill_worker": Layer(may=("kv_transfer",), may_torch_free=("engine",), must_not=("ray",)),
    "decode_worker": Layer(may=("kv_transfer",), may_torch_free=("engine",), must_not=("ray",)),
    "router": Layer(may_torch_free=("engine",), must_not=("torch", "triton", "ray")),
    "cluster": Layer(may=(*ENGINE_SIDE, "router")),
    "benchmarks": Layer(may=(*PACKAGES, "tests.oracle")),
}
NOWHERE = ("transformers",)  # a test oracle
LOCAL_PIPES = (
    "engine/step_runner.py",
    "engine/process.py",
    "engine/follower.py",
    "kv_transfer/carriers/distributed/pipe.py",
)  # between a parent and its own child: sockets, pickle
MODEL_FETCHER = "engine/models/fetch.py"  # before an engine starts; imports its HTTP client when it needs it


def find_forbidden_imports(sources: Sources) -> Iterator[Fault]:
    heavy = torch_modules(sources)
    for source in sources.values():
        for each in source.imports:
            if each.module.startswith("socket") and source.path in LOCAL_PIPES:
                continue
            if each.is_of(("httpx",)) and source.path == MODEL_FETCHER:
                continue
            if reason := _refusal(LAYERS[source.package], source.package, each, heavy):
                yield Fault(source.path, each.line, f"{source.package} must not import {each.module}: {reason}")


def _refusal(layer: Layer, package: str, each: Import, heavy: set[str]) -> str | None:
    if name := each.is_of(NOWHERE):
        return f"{name} is imported by tests only"
    if name := each.is_of(layer.must_not):
        return f"{package} is kept free of {name}"
    if each.is_of((package, *layer.may)):
        return None
    if each.is_of(layer.may_torch_free):
        return "it loads torch" if each.module in heavy else None
    if name := each.is_of(OURS):
        return f"it may import {', '.join((*layer.may, *layer.may_torch_free)) or 'nothing'} of ours"
    if layer.only is not None and each.module.split(".")[0] not in (*layer.only, *sys.stdlib_module_names):
        return f"it may import {', '.join(layer.only)} and the standard library"
    return None


# --- the clock seam -------------------------------------------------------------------------------------------

SIMULATED = (
    "engine/types.py", "engine/errors.py", "engine/planes.py", "engine/sequence.py", "engine/block_manager.py",
    "engine/scheduler.py", "engine/engine.py", "engine/prefix*.py", "engine/streams.py", "cluster/sides.py",
    "kv_transfer/*", "prefill_worker/*", "decode_worker/*", "router/*", "cluster/simulator/*", "cluster/control/*",
)  # fmt: skip
REAL = tuple(f"kv_transfer/carriers/{name}*.py" for name in ("grpc", "shm", "dist", "door", "sample"))

CLOCKS = ("time", "threading", "random", "uuid", "secrets", "numpy.random")
CLOCK_CALLS = (
    "os.urandom", "os.getrandom", "asyncio.get_event_loop",
    "datetime.datetime.now", "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today",
)  # fmt: skip


def is_simulated(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in SIMULATED) and not any(fnmatch(path, pattern) for pattern in REAL)


def find_clocks(sources: Sources) -> Iterator[Fault]:
    """Simulated modules get time from the running loop, and ids and randomness from whoever builds them."""
    for source in sources.values():
        if is_simulated(source.path):
            for line, name in _uses(source):
                if banned := _within(name, (*CLOCKS, *CLOCK_CALLS)):
                    yield Fault(source.path, line, f"simulated modules must not use {banned}")


def find_set_orders(sources: Sources) -> Iterator[Fault]:
    """The order of a set changes from run to run, so simulated modules never depend on one."""
    for source in sources.values():
        if is_simulated(source.path):
            for line, text in find_unordered_iterations(source.tree):
                yield Fault(source.path, line, f"the order of a set is not the same in every run: {text} (use sorted)")


# --- bans everywhere ------------------------------------------------------------------------------------------

PICKLES = ("pickle", "dill", "cloudpickle", "ray.cloudpickle", "marshal", "shelve", "joblib", "torch.load")


def find_pickles(sources: Sources) -> Iterator[Fault]:
    """Nothing from a file or a peer is ever unpickled."""
    for source in sources.values():
        if source.path not in LOCAL_PIPES:
            for line, name in _uses(source):
                if banned := _within(name, PICKLES):
                    yield Fault(source.path, line, f"{banned} runs code that it reads")


def find_swallowed_errors(sources: Sources) -> Iterator[Fault]:
    """Every error reaches its request: none is caught whole and dropped."""
    for source in sources.values():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler | ast.Call) and _drops_all_errors(node):
                yield Fault(source.path, node.lineno, "every error is caught here and dropped")


def _drops_all_errors(node: ast.ExceptHandler | ast.Call) -> bool:
    if isinstance(node, ast.ExceptHandler):
        return _catches_all(node.type) and all(map(_is_nothing, node.body))
    return ast.unparse(node.func) in ("suppress", "contextlib.suppress") and any(map(_catches_all, node.args))


def _catches_all(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(map(_catches_all, kind.elts))
    return kind is None or ast.unparse(kind) in ("Exception", "BaseException")


def _is_nothing(statement: ast.stmt) -> bool:
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)  # ... or a docstring
    return is_constant or isinstance(statement, ast.Pass)


def _within(name: str, banned: tuple[str, ...]) -> str | None:
    return next((each for each in banned if name == each or name.startswith(f"{each}.")), None)


def _uses(source: Source) -> set[tuple[int, str]]:
    """Dotted names, imported or used, with what an import renamed put back: `np.random.rand` is numpy.random.rand."""
    uses = {(each.line, each.module) for each in source.imports}
    origins = dict(_renamings(source.tree))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in origins:
                uses.add((node.lineno, f"{origins[first]}.{rest}"))
    return uses


def _renamings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(local name, what it stands for) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


RULES: dict[str, Callable[[Sources], Iterator[Fault]]] = {
    "imports": find_forbidden_imports,
    "clock": find_clocks,
    "set order": find_set_orders,
    "pickle": find_pickles,
    "swallowed errors": find_swallowed_errors,
}
