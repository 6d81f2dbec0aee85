"""Reads DistServe's coefficients: {model: {tensor_parallel: {prefill: [a, b, c], decoding_smallbs: ...}}}, in ms."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from cluster.simulator.service_times.distserve import Coefficients, DistServeDecode, DistServePrefill
from cluster.simulator.service_times.phases import PhaseTimes
from cluster.simulator.service_times.tables import Tables
from engine.errors import ConfigError

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Triple = tuple[Milliseconds, Milliseconds, Milliseconds]


class _Coefficients(BaseModel, extra="forbid"):
    prefill: Triple
    decoding_smallbs: Triple
    decoding_largebs: Triple
    decoding_large_small_bs_threshold: int = Field(ge=0)

    def times(self) -> PhaseTimes:
        decode = DistServeDecode(
            _seconds(self.decoding_smallbs), _seconds(self.decoding_largebs), self.decoding_large_small_bs_threshold
        )
        return PhaseTimes(DistServePrefill(_seconds(self.prefill)), decode)


_FILE = TypeAdapter(dict[str, dict[int, _Coefficients]])


def read_json(path: Path) -> Tables:
    """Raises ConfigError, which names the key."""
    try:
        models = _FILE.validate_python(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        faults = ((".".join(map(str, fault["loc"])) or "top level", fault["msg"]) for fault in error.errors())
        raise ConfigError("\n".join(f"{path}: {key}: {message}" for key, message in faults)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    return {
        model: {size: partial(_Coefficients.times, found) for size, found in sizes.items()}
        for model, sizes in models.items()
    }


def _seconds(milliseconds: Triple) -> Coefficients:
    constant, linear, square = milliseconds
    return constant / 1e3, linear / 1e3, square / 1e3
