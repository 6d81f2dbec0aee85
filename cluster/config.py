"""The whole configuration of a cluster, read from one YAML file.

1. Each part owns its own model (engine, kv_transfer, prefill_worker, decode_worker, router); here they are composed.
2. `load_config` reads the file, puts the command line's overrides in, and checks everything at once.
3. Every fault is one line with its key's path; nothing is altered after load.

Secrets never stand in the file: they come from environment variables, which the code that needs them reads.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeGuard, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from cluster.control.rules import ControllerConfig
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig, ModelSource, StrictModel
from engine.errors import ConfigError
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.policies.snapshot import EngineLimits

Model = TypeVar("Model", bound=BaseModel)


class ClusterSection(StrictModel):
    """The cluster's name and how long it lives."""

    name: str = Field(default="steelyard", min_length=1, description="Ray namespace of all its actors")
    lifetime: Literal["job", "detached"] = Field(default="job", description="job: ends with the one who started it")
    driver_lease_s: float = Field(default=10.0, gt=0, description="job: ends so long after its driver's last heartbeat")
    start_timeout_s: float = Field(default=180.0, gt=0, description="a cluster that is not ready by then is taken down")


class RaySection(StrictModel):
    """Which Ray the cluster runs on."""

    address: str | None = Field(default=None, min_length=1, description="null: the job's Ray, else a local one")
    object_store_memory_mb: int = Field(default=100, ge=80, description="for a local Ray; Ray refuses less than 75 MiB")
    include_dashboard: bool = Field(default=False, description="for a local Ray")


class TlsSection(StrictModel):
    """Files of mutual TLS, in PEM, on every node by the same path; without them calls travel in plain text."""

    ca_file: str | None = Field(default=None, min_length=1, description="certificate of the authority that is believed")
    cert_file: str | None = Field(default=None, min_length=1, description="this node's, of the name steelyard")
    key_file: str | None = Field(default=None, min_length=1, description="its private key, without a password")

    @model_validator(mode="after")
    def _all_or_none(self) -> TlsSection:
        absent = [name for name in type(self).model_fields if getattr(self, name) is None]
        if absent and len(absent) < len(type(self).model_fields):
            raise ValueError(f"give all of ca_file, cert_file and key_file, or none; missing: {', '.join(absent)}")
        return self


class RpcSection(StrictModel):
    """Calls between gateways and workers."""

    tls: TlsSection = TlsSection()


class PoolConfig(StrictModel):
    """One pool of workers, and what each rank of a worker takes of its node."""

    workers: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1, le=64, description="ranks of one worker")
    num_cpus: float = Field(default=1.0, ge=0, description="per rank")
    num_gpus: float = Field(default=0.0, ge=0, description="per rank")
    resources: dict[str, float] = Field(default_factory=dict, description="custom Ray resources per rank")


class PoolsSection(StrictModel):
    """The two pools at the start."""

    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()


class ClusterConfig(StrictModel):
    """Everything that one cluster is told; every key has a default."""

    cluster: ClusterSection = ClusterSection()
    ray: RaySection = RaySection()
    rpc: RpcSection = RpcSection()
    model: ModelSource = ModelSource()
    engine: EngineConfig = EngineConfig()
    kv_transfer: TransferConfig = TransferConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    router: RouterConfig = RouterConfig()
    controller: ControllerConfig = ControllerConfig()
    pools: PoolsSection = PoolsSection()

    @property
    def engine_limits(self) -> EngineLimits:
        """As the router knows them."""
        one = self.engine
        return EngineLimits(one.block_size, one.prefill_chunk, one.max_batch_tokens, one.max_batch_seqs)

    @property
    def num_workers(self) -> int:
        """At the start."""
        return self.pools.prefill.workers + self.pools.decode.workers

    @property
    def controller_rules(self) -> ControllerConfig:
        """Only our own policy serves both phases on every worker with targets in view. The number of workers is as the
        pools say, where no other is given."""
        may_join = self.controller.together and self.router.policy == "slo"
        scale = self.controller.scale
        bounds = {"min_workers": scale.min_workers or self.num_workers,
                  "max_workers": scale.max_workers or self.num_workers}  # fmt: skip
        return self.controller.model_copy(update={"together": may_join, "scale": scale.model_copy(update=bounds)})

    @property
    def is_controlled(self) -> bool:
        """Is there anything to decide?"""
        rules = self.controller_rules
        has_splits = self.num_workers >= (2 if rules.together else 3)
        return rules.mode != "off" and (has_splits or rules.scale.is_on)

    @model_validator(mode="after")
    def _parts_fit(self) -> ClusterConfig:
        if conflicts := list(_conflicts(self)):
            raise ValueError("\n".join(conflicts))
        return self


def _conflicts(config: ClusterConfig) -> Iterator[str]:
    """Combinations that no single part can see are impossible; one line each, path first."""
    engine, context = config.engine, config.model.max_context
    capacity = engine.num_blocks * engine.block_size
    if context is not None and context > capacity:
        yield (
            f"model.max_context: {context} tokens do not fit in engine.num_blocks x engine.block_size = {capacity}; "
            f"use num_blocks: {math.ceil(context / engine.block_size)} or more"
        )
    yield from _scale_conflicts(config)
    if "dist" in config.kv_transfer.carriers and config.rpc.tls.ca_file is not None:
        yield (
            f"kv_transfer.carrier: {config.kv_transfer.carrier} would send KV in plain text beside rpc.tls; "
            f"use auto, grpc or shm"
        )
    for name, pool in (("prefill", config.pools.prefill), ("decode", config.pools.decode)):
        if engine.device == "cuda" and pool.num_gpus < 1:
            yield f"pools.{name}.num_gpus: engine.device is cuda, so every rank needs at least 1, got {pool.num_gpus:g}"
        if pool.tensor_parallel > 1 and engine.runner != "process":
            yield (
                f"pools.{name}.tensor_parallel: {pool.tensor_parallel} ranks need engine.runner: process, "
                f"which there is for engine.device: cpu only"
            )
        if engine.device == "cpu" and pool.num_gpus > 0:
            yield f"pools.{name}.num_gpus: engine.device is cpu, so {pool.num_gpus:g} would be taken and never used"


def _scale_conflicts(config: ClusterConfig) -> Iterator[str]:
    scale, pools = config.controller.scale, config.pools
    if scale.min_workers is not None and scale.min_workers > config.num_workers:
        yield f"controller.scale.min_workers: {scale.min_workers}, but the pools begin with {config.num_workers}"
    if scale.max_workers is not None and scale.max_workers < config.num_workers:
        yield f"controller.scale.max_workers: {scale.max_workers}, but the pools begin with {config.num_workers}"
    if config.controller_rules.scale.is_on and pools.prefill.tensor_parallel != pools.decode.tensor_parallel:
        yield (
            f"controller.scale: workers come and go only where all are alike, but pools.prefill.tensor_parallel is "
            f"{pools.prefill.tensor_parallel} and pools.decode.tensor_parallel {pools.decode.tensor_parallel}"
        )


def load_config(path: str | Path, overrides: Mapping[str, object] = {}) -> ClusterConfig:
    """Read a YAML file; `overrides` maps dotted paths ("router.port") to values that win over the file's.

    Raises ConfigError whose message has one line per fault.
    """
    values = read_yaml(Path(path))
    for dotted, value in overrides.items():
        _override(values, dotted, value)
    return validated(ClusterConfig, values, f"{path}: ")


def validated(model: type[Model], values: object, where: str, strict: bool = True) -> Model:
    """Raises ConfigError whose message has one line per fault: `where`, the key's path and what is wrong. Unless
    `strict`, numbers may be text."""
    try:
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        faults = (line for details in error.errors() for line in _explain(details, model))
        raise ConfigError("\n".join(f"{where}{fault}" for fault in faults)) from error


# --- reading --------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[object, object]:
    """Raises ConfigError that names the line."""
    try:
        with path.open("rb") as file:
            values: object = yaml.load(file, Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, say
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, got {_shown(values)}")
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML without its traps: a key given twice, and numbers that are not finite, are faults with a line."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _fault(key, f"the key {key.value!r} is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise _fault(node, f"{node.value} is not a finite number")
        return value


def _fault(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _override(values: dict[object, object], dotted: str, value: object) -> None:
    *sections, key = dotted.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: cannot be set, because {name} is not a section but {_shown(inner)}")
        values = inner
    values[key] = value


# --- explaining -----------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "keys with values",
    "model_type": "keys with values",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _explain(details: ErrorDetails, model: type[BaseModel]) -> Iterator[str]:
    """One pydantic fault as lines, each with its path, what was expected and what was there."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = ".".join(str(part) for part in details["loc"])
    prefix = f"{path}: " if path else ""
    if kind == "value_error":  # from one of our own validators
        yield from (f"{prefix}{line}" for line in str(context["error"]).split("\n"))
    elif kind == "extra_forbidden":
        yield f"{prefix}unknown key{_suggestion(details['loc'], model)}"
    elif kind == "missing":
        yield f"{prefix}is missing"
    elif kind == "invalid_key":
        section = ".".join(str(part) for part in details["loc"][:-1])
        yield f"{section or 'top level'}: a key must be text, got {_shown(value)}; put it in quotes"
    elif kind in _EXPECTED:
        yield f"{prefix}expected {_EXPECTED[kind]}, got {_shown(value)}"
    elif kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        yield f"{prefix}must be {words} {context[bound]:.15g}, got {_shown(value)}"
    elif kind == "literal_error":
        yield f"{prefix}expected {context['expected']}, got {_shown(value)}"
    elif kind == "string_too_short":
        yield f"{prefix}must not be empty"
    else:
        yield f"{prefix}{details['msg']}, got {_shown(value)}"


def _suggestion(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The likeliest key meant: one of the same name in another section, else a sibling with a similar name."""
    section = model
    for part in loc[:-1]:
        if isinstance(part, str):  # else it is a place in a list of sections
            annotation = section.model_fields[part].annotation
            section = next(inner for inner in (annotation, *get_args(annotation)) if _is_section(inner))
    key = str(loc[-1])
    elsewhere = [path for path in key_paths(model) if path.split(".")[-1] == key]
    meant = elsewhere or difflib.get_close_matches(key, list(section.model_fields), n=1)
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys that a model and its sections know, sections too."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if _is_section(field.annotation):
            yield from key_paths(field.annotation, f"{prefix}{name}.")


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _shown(value: object) -> str:
    """A value as the user of a YAML file would call it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)
