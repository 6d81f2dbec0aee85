"""A case: all that a fault run depends on, as a record and as a file.

The file is JSON; what it holds is checked when it is read, and unknown keys are refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.simulator.faults.plan import Plan
from cluster.simulator.faults.scenario import Scenario
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Case:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    scenario: Scenario
    plan: Plan = ()


_CASE = TypeAdapter(Case)


def to_json(case: Case) -> str:
    return json.dumps(asdict(case), indent=1) + "\n"


def load_case(path: Path) -> Case:
    """Raises ConfigError, which names the file and the field."""
    try:
        return _CASE.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
