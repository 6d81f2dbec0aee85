"""The tree keeps the rules of the house, and each rule is seen to fail on a source that breaks it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import OURS, PACKAGES, RULES, Sources, check, is_simulated, read_sources, torch_modules

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sources() -> Sources:
    """Of the tree; parsed once, for it takes seconds."""
    return read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: str, sources: Sources) -> None:
    faults = sorted(set(RULES[rule](sources)))
    assert not faults, "\n" + "\n".join(map(str, faults))


def test_every_package_is_under_the_rules(sources: Sources) -> None:
    assert {source.package for source in sources.values()} >= set(PACKAGES)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(OURS)


def test_modules_said_to_be_torch_free_load_without_torch(sources: Sources) -> None:
    """Python itself is asked: in a process where torch and triton cannot be imported."""
    heavy = torch_modules(sources)
    asked = [name for name in sources if name.split(".")[0] in ("engine", "router") and name not in heavy]
    asked += [name for name, source in sources.items() if is_simulated(source.path) and name not in (*asked, *heavy)]
    code = "import sys; sys.modules |= {'torch': None, 'triton': None}\nfor name in sys.argv[1:]: __import__(name)"
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_installed_distribution_takes_a_name_of_ours() -> None:
    owners = importlib.metadata.packages_distributions()
    taken = {name: set(owners.get(name, ())) - {"steelyard"} for name in PACKAGES}
    assert not any(taken.values()), f"uninstall these, they hide packages of ours: {taken}"


# --- each rule, broken ----------------------------------------------------------------------------------------

HEAVY = {"engine/runner.py": "import torch\n"}  # an engine file that loads torch, for the planted trees

FORBIDDEN_IMPORTS = {
    "kernels uses engine": ("kernels/cpu.py", "import engine.types"),
    "kernels uses numpy's peer": ("kernels/cpu.py", "import scipy"),
    "engine uses kv_transfer": ("engine/scheduler.py", "from kv_transfer import lease"),
    "engine uses router": ("engine/scheduler.py", "import router.policy"),
    "engine uses cluster": ("engine/scheduler.py", "from cluster.config import ClusterConfig"),
    "engine uses a worker": ("engine/scheduler.py", "from prefill_worker.outbox import Outbox"),
    "engine uses ray": ("engine/scheduler.py", "import ray"),
    "engine uses the network": ("engine/scheduler.py", "from grpc import aio"),
    "engine uses an HTTP client": ("engine/models/pull.py", "def f():\n    import httpx"),
    "engine opens sockets": ("engine/scheduler.py", "import socket"),
    "kv_transfer uses torch's side of engine": ("kv_transfer/pull.py", "from engine.runner import Runner"),
    "kv_transfer uses kernels": ("kv_transfer/pull.py", "import kernels"),
    "kv_transfer uses router": ("kv_transfer/pull.py", "from router.api import Generator"),
    "kv_transfer uses ray": ("kv_transfer/pull.py", "import ray"),
    "prefill_worker uses decode_worker": ("prefill_worker/outbox.py", "from decode_worker import intake"),
    "prefill_worker uses router": ("prefill_worker/outbox.py", "import router"),
    "prefill_worker uses torch's side of engine": ("prefill_worker/outbox.py", "from engine import runner"),
    "decode_worker uses prefill_worker": ("decode_worker/intake.py", "import prefill_worker.outbox"),
    "decode_worker uses cluster": ("decode_worker/intake.py", "import cluster.worker"),
    "decode_worker uses ray": ("decode_worker/intake.py", "import ray"),
    "router uses torch": ("router/policy.py", "import torch.nn.functional as F"),
    "router uses torch through engine": ("router/policy.py", "import engine.runner"),
    "router uses ray": ("router/policy.py", "from ray.util import state"),
    "router uses a worker": ("router/policy.py", "import prefill_worker.queue"),
    "router uses kv_transfer": ("router/policy.py", "import kv_transfer.lease"),
    "router uses cluster": ("router/policy.py", "import cluster.config"),
    "cluster uses benchmarks": ("cluster/worker.py", "import benchmarks.serve"),
    "cluster uses tests": ("cluster/worker.py", "from tests.fakes import Worker"),
    "benchmarks uses tests": ("benchmarks/serve.py", "import tests"),
    "the oracle at run time": ("cluster/worker.py", "from transformers import AutoModel"),
    "the oracle in a benchmark": ("benchmarks/serve.py", "import transformers"),
    "inside a function": ("engine/scheduler.py", "def step():\n    import ray\n"),
    "for types only": ("router/policy.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"),
    "by a relative name": ("prefill_worker/outbox.py", "from ..router import api"),
    "by a string": ("engine/scheduler.py", "import importlib\nray = importlib.import_module('ray.util')"),
    "among others": ("engine/scheduler.py", "import math, ray"),
}

CLOCKS = {
    "sleep": ("router/policy.py", "import time\ntime.sleep(1)"),
    "a clock's name": ("engine/scheduler.py", "from time import monotonic as now"),
    "a lock": ("kv_transfer/lease.py", "import threading"),
    "random": ("decode_worker/intake.py", "import random"),
    "numpy's random": ("router/policy.py", "import numpy as np\nx = np.random.default_rng()"),
    "uuid": ("router/gateway.py", "from uuid import uuid4"),
    "secrets": ("prefill_worker/outbox.py", "import secrets"),
    "urandom": ("kv_transfer/lease.py", "import os\nkey = os.urandom(16)"),
    "urandom by name": ("kv_transfer/lease.py", "from os import urandom"),
    "today": ("router/gateway.py", "import datetime\nx = datetime.date.today()"),
    "now": ("router/gateway.py", "from datetime import datetime as dt\nx = dt.now()"),
    "utcnow": ("router/gateway.py", "import datetime as d\nx = d.datetime.utcnow()"),
    "a loop that is not running": ("cluster/simulator/clock.py", "import asyncio\nloop = asyncio.get_event_loop()"),
    "in a function": ("engine/prefix_index.py", "def f():\n    import time\n"),
}

UNORDERED = {
    "a literal": "for x in {1, 2}: print(x)",
    "a call": "for x in set(y): print(x)",
    "a set comprehension": "z = [x for x in {x for x in y}]",
    "list": "z = list(frozenset(y))",
    "tuple": "z = tuple({1, 2})",
    "a name": "live = set()\nfor x in live: print(x)",
    "an annotated name": "live: set[int] = make()\nfor x in live: print(x)",
    "a parameter": "def f(live: set[int] | None):\n    return [x for x in live or ()]",
    "an abstract set": "from collections.abc import Set\ndef f(live: Set[int]):\n    yield from live",
    "an attribute": "class A:\n    def __init__(self): self.live = set()\n    def f(self): return list(self.live)",
    "an annotated attribute": "def f(a):\n    a.live: set[int] = make()\n    return {x: 1 for x in a.live}",
    "a field of a record": "class A:\n    live: frozenset[int]\ndef f(a):\n    return list(a.live)",
    "a mapping's sets": "def f(waiting: dict[str, set[int]]):\n    for x in waiting['a']: print(x)",
    "a mapping's sets by get": "def f(waiting: dict[str, set[int]]):\n    for x in waiting.pop('a', ()): print(x)",
    "an operator": "def f(a: set[int], b: set[int]):\n    for x in a - b: print(x)",
    "an operator on keys": "def f(a, b):\n    for x in a.keys() - b.keys(): print(x)",
    "a method": "def f(a: set[int], b):\n    for x in a.union(b): print(x)",
    "a function's answer": "def live() -> set[int]: ...\nfor x in live(): print(x)",
    "asyncio.wait": "async def f(tasks):\n    done, rest = await asyncio.wait(tasks)\n    for x in done: print(x)",
    "a star": "def f(tasks: set):\n    return gather(*tasks)",
    "unpacking": "a, b = {1, 2}",
    "any element": "live = {1, 2}\nx = live.pop()",
    "the first of equals": "live = {1, 2}\nx = min(live, key=str)",
    "sum": "live = {0.1, 0.2}\nx = sum(live)",
    "join": "x = ','.join({'a', 'b'})",
    "an outer name": "live = set()\ndef f():\n    return [x for x in live]",
    "enumerate": "for i, x in enumerate({1, 2}): print(i, x)",
}

ORDERED = {
    "sorted": "for x in sorted({1, 2}): print(x)",
    "sorted elements": "live = set()\nz = sorted(x + 1 for x in live)",
    "a question": "live = set()\nz = any(x > 1 for x in live) or len(live) or 3 in live or max(live)",
    "another set": "live = set()\nz = {x + 1 for x in live} | set(y for y in live)",
    "a dict": "live = {}\nfor x in live: print(x)\nlive.pop('a')",
    "a list after all": "live = set()\nlive = sorted(live)\nfor x in live: print(x)",
    "another function's name": "def f():\n    live = {1}\n    return live\ndef g(live):\n    for x in live: print(x)",
    "a mapping's keys": "def f(waiting: dict[str, set[int]]):\n    for x in waiting: print(x)",
}

PICKLES = {
    "pickle": ("kv_transfer/frames.py", "import pickle"),
    "by a name": ("cluster/worker.py", "from cloudpickle import loads"),
    "a checkpoint": ("engine/models/weights.py", "import torch\nstate = torch.load('x.bin')"),
    "a checkpoint by name": ("engine/models/weights.py", "from torch import load"),
    "in a function": ("engine/models/weights.py", "def f():\n    import pickle as p\n"),
}

SWALLOWED = {
    "pass": "try:\n    f()\nexcept Exception:\n    pass",
    "dots": "try:\n    f()\nexcept BaseException:\n    ...",
    "bare": "try:\n    f()\nexcept:\n    pass",
    "among others": "try:\n    f()\nexcept (ValueError, Exception):\n    pass",
    "suppress": "import contextlib\nwith contextlib.suppress(Exception):\n    f()",
}


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """Write a small tree and say what is wrong with it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return [str(fault) for fault in check(root)]


def test_a_planted_tree_that_keeps_the_rules_has_no_faults(tmp_path: Path) -> None:
    files = HEAVY | {
        "kernels/cpu.py": "import math\nimport torch\nimport kernels.reference",
        "engine/types.py": "import typing\nif typing.TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n",
        "engine/model.py": "from kernels.cpu import attention\nfrom .runner import Runner",
        "kv_transfer/pull.py": "import numpy\nfrom engine import types",
        "kv_transfer/carriers/grpc_carrier.py": "import grpc\nimport time",
        "prefill_worker/outbox.py": "from engine.types import Key\nfrom kv_transfer.pull import pull",
        "router/gateway.py": "import fastapi\nfrom engine.types import Key\nfrom . import policy",
        "cluster/worker.py": "import random\nimport ray\nimport engine.runner\nimport prefill_worker, router",
        "benchmarks/serve.py": "import time\nimport cluster.worker",
        "engine/process.py": "import pickle\nimport socket",
    }
    assert plant(tmp_path, files) == []


@pytest.mark.parametrize("name", FORBIDDEN_IMPORTS)
def test_a_forbidden_import_is_seen(name: str, tmp_path: Path) -> None:
    path, text = FORBIDDEN_IMPORTS[name]
    (fault,) = plant(tmp_path, HEAVY | {path: text})
    assert fault.startswith(f"{path}:")
    assert "must not import" in fault


def test_torch_is_seen_through_other_files(tmp_path: Path) -> None:
    files = HEAVY | {
        "engine/far.py": "from engine.near import x",
        "engine/near.py": "import engine.runner",
        "engine/models/__init__.py": "import kernels",
        "engine/models/config.py": "import math",
        "router/a.py": "import engine.far",
        "router/b.py": "def f():\n    from engine.models import config",
    }
    assert plant(tmp_path, files) == [
        "router/a.py:1: router must not import engine.far: it loads torch",
        "router/b.py:2: router must not import engine.models.config: it loads torch",
    ]


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_in_a_simulated_module_is_seen(name: str, tmp_path: Path) -> None:
    path, text = CLOCKS[name]
    faults = plant(tmp_path, {path: text})
    assert faults
    assert all("simulated modules must not use" in fault for fault in faults)


@pytest.mark.parametrize("name", UNORDERED)
def test_iteration_over_a_set_in_a_simulated_module_is_seen(name: str, tmp_path: Path) -> None:
    faults = plant(tmp_path, {"engine/scheduler.py": UNORDERED[name]})
    assert len(faults) == 1
    assert "the order of a set" in faults[0]


@pytest.mark.parametrize("name", ORDERED)
def test_what_cannot_see_the_order_of_a_set_is_allowed(name: str, tmp_path: Path) -> None:
    assert plant(tmp_path, {"engine/scheduler.py": ORDERED[name]}) == []


def test_the_clock_seam_ends_where_the_real_world_begins(tmp_path: Path) -> None:
    text = "import time\nfor x in {1, 2}: print(x)"
    carriers = [f"kv_transfer/carriers/{name}.py" for name in ("grpc", "shm", "door", "sample")]
    real = ("engine/step_runner.py", "cluster/worker.py", *carriers)
    assert plant(tmp_path, dict.fromkeys(real, text)) == []


@pytest.mark.parametrize("name", PICKLES)
def test_unpickling_is_seen(name: str, tmp_path: Path) -> None:
    path, text = PICKLES[name]
    faults = plant(tmp_path, {path: text})
    assert faults
    assert all("runs code that it reads" in fault for fault in faults)


@pytest.mark.parametrize("name", SWALLOWED)
def test_a_swallowed_error_is_seen(name: str, tmp_path: Path) -> None:
    (fault,) = plant(tmp_path, {"cluster/worker.py": SWALLOWED[name]})
    assert "caught here and dropped" in fault
