"""Traces: recorded arrivals, read from the two formats in which such traces are published.

- Azure's LLM inference traces: CSV with the columns TIMESTAMP, ContextTokens and GeneratedTokens;
- Mooncake's (FAST 2025): JSON lines with timestamp (ms), input_length, output_length and, where prompts share
  beginnings, hash_ids: the names of a prompt's successive blocks of 512 tokens.

Times count from the first request. Whatever is wrong is a ConfigError with file and line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from cluster.config import validated
from cluster.simulator.workloads.prompts import num_pieces
from cluster.simulator.workloads.shape import shift
from cluster.simulator.workloads.workload import Arrival, Workload
from engine.errors import ConfigError

BLOCK_TOKENS = 512  # that one of Mooncake's hash_ids stands for
MAX_TOKENS = 10**8  # of one request; more is no length


class _AzureRow(BaseModel):
    at: datetime = Field(alias="TIMESTAMP")
    num_prompt: int = Field(alias="ContextTokens", ge=1, le=MAX_TOKENS)
    num_output: int = Field(alias="GeneratedTokens", ge=1, le=MAX_TOKENS)


class _MooncakeRow(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    timestamp: float  # ms
    input_length: int = Field(ge=1, le=MAX_TOKENS)
    output_length: int = Field(ge=1, le=MAX_TOKENS)
    hash_ids: list[int] = []


def read_trace(path: Path) -> Workload:
    """The format is told from the first line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            rows = _mooncake_rows if first.lstrip().startswith("{") else _azure_rows
            arrivals = sorted(rows(path, chain((first,), file)), key=lambda arrival: arrival.at_s)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a trace: it is not text") from error
    if not arrivals:
        raise ConfigError(f"{path}: has no requests")
    return shift(Workload(path.name, tuple(arrivals), BLOCK_TOKENS), -arrivals[0].at_s)


def _azure_rows(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    reader = csv.reader(lines)
    try:
        columns = next(reader, [])
        if missing := [str(field.alias) for field in _AzureRow.model_fields.values() if field.alias not in columns]:
            known = "CSV with TIMESTAMP, ContextTokens and GeneratedTokens, or JSON lines with input_length"
            raise ConfigError(f"{path}:1: is no trace that is known here ({known}): no column {missing[0]}")
        begin: datetime | None = None
        for row in filter(None, reader):
            where = f"{path}:{reader.line_num}: "
            if len(row) != len(columns):
                raise ConfigError(f"{where}{len(row)} fields where the first line has {len(columns)}")
            read = validated(_AzureRow, dict(zip(columns, row, strict=True)), where, strict=False)
            at = read.at if read.at.tzinfo else read.at.replace(tzinfo=UTC)
            begin = begin or at
            yield Arrival((at - begin).total_seconds(), read.num_prompt, read.num_output)
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}") from error


def _mooncake_rows(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    names: dict[int, int] = {}  # from their hash_ids to ours, which are dense
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}: "
        try:
            values: object = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}is not JSON: {error}") from error
        read = validated(_MooncakeRow, values, where)
        pieces = tuple(names.setdefault(name, len(names)) for name in read.hash_ids)
        arrival = Arrival(read.timestamp / 1000, read.input_length, read.output_length, pieces)
        if pieces and len(pieces) != (needed := num_pieces(arrival, BLOCK_TOKENS)):
            raise ConfigError(
                f"{where}hash_ids: {len(pieces)} blocks of {BLOCK_TOKENS} tokens, but input_length {read.input_length} "
                f"needs {needed}"
            )
        yield arrival
