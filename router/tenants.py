"""Tenants: who may ask, known by their API keys.

1. `parse_tenants` reads the keys file (YAML), `parse_tenant` a file that is one tenant's. 2. `ring_of` makes a KeyRing
of them; `KeyRing.find` names the tenant of a key.

Keys are told by their SHA-256 only, so a file that is read by others gives none away. A slow hash is for passwords,
which can be guessed; a key of ours is 256 random bits, and nobody can try them all. Knows nothing of HTTP and files.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator

from engine.config import StrictModel
from engine.errors import ConfigError

Model = TypeVar("Model", bound=StrictModel)

KEY_PREFIX = "sk-"
HASH_PREFIX = "sha256:"
MAX_KEY_BYTES = 512  # a longer one is nobody's, and is not hashed


class Limits(StrictModel):
    """What one tenant may use at the most, over all gateways; null: as much as it likes."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1, description="prompt and generated tokens")
    max_live_requests: int | None = Field(default=None, ge=1, description="at the same time")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="of one request")
    max_tokens: int | None = Field(default=None, ge=1, description="generated, of one request, over all its answers")
    max_body_bytes: int | None = Field(default=None, ge=1)


class Tenant(StrictModel):
    """One entry of the keys file. An empty list of keys: nobody can be this tenant."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    keys: tuple[str, ...] = Field(default=(), repr=False)
    enabled: bool = True
    priority: int = Field(default=0, ge=-100, le=100, description="of two, the higher number yields")
    limits: Limits = Limits()
    slo_class: str | None = Field(default=None, description="of router.classes, for requests that name none")
    allowed_classes: tuple[str, ...] | None = Field(default=None, description="that requests may name; null: any")

    def may_use(self, name: str) -> bool:
        return self.allowed_classes is None or name in (*self.allowed_classes, self.slo_class)

    @field_validator("keys")
    @classmethod
    def _are_hashes(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        """The message tells the place and never the entry: it may be a key that was pasted as it is."""
        for index, one in enumerate(keys):
            if len(one) != len(HASH_PREFIX) + 64 or not one.startswith(HASH_PREFIX) or not _is_hex(one[7:]):
                raise ValueError(f"entry {index} is no {HASH_PREFIX}<64 hex digits>; make one with: steelyard keys new")
        return keys


class _File(StrictModel):
    tenants: tuple[Tenant, ...] = ()


OPEN = Tenant.model_construct(name="")  # its other fields are those of a tenant that says nothing


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All tenants by the digests of their keys."""

    entries: tuple[tuple[bytes, Tenant], ...] = ()

    def find(self, key: bytes) -> Tenant | None:
        """Whose key it is. Every digest is compared, each in constant time, so how long it takes tells nothing."""
        if len(key) > MAX_KEY_BYTES:
            return None
        digest, found = sha256(key).digest(), None
        for known, tenant in self.entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        return tuple({tenant.name: tenant for _, tenant in self.entries}.values())


def parse_tenants(text: str) -> tuple[Tenant, ...]:
    """The keys file. ConfigError names the place of what is wrong, and shows nothing of its content."""
    return _validated(_File, _yaml(text, "router.keys_file"), "router.keys_file").tenants


def parse_tenant(name: str, text: str) -> Tenant:
    """A file that is named as its tenant: keys, one a line, as they are or hashed, or YAML as of a tenant in the keys
    file, without the name. ConfigError as above."""
    place = f"router.keys_folder: {name}"
    lines = text.split()
    if lines and all(line.startswith((KEY_PREFIX, HASH_PREFIX)) for line in lines):
        fields: object = {"keys": [line if line.startswith(HASH_PREFIX) else hash_of(line) for line in lines]}
    else:
        fields = _yaml(text, place)
    return _validated(Tenant, {"name": name, **fields} if isinstance(fields, dict) else fields, place)


def _yaml(text: str, place: str) -> object:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{place}: no YAML{where}", param=place.partition(":")[0]) from None
    return {} if data is None else data


def _validated(kind: type[Model], data: object, place: str) -> Model:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"{place}: {where}: {first['msg']}", param=place.partition(":")[0]) from None


def ring_of(tenants: Iterable[Tenant]) -> KeyRing:
    """ConfigError for a name or a key that is there twice."""
    tenants = tuple(tenants)
    entries = tuple((bytes.fromhex(key[len(HASH_PREFIX) :]), tenant) for tenant in tenants for key in tenant.keys)
    if len({tenant.name for tenant in tenants}) < len(tenants):
        raise ConfigError("router.keys_file, keys_folder: two tenants have the same name", param="router.keys_file")
    if len({digest for digest, _ in entries}) < len(entries):
        raise ConfigError("router.keys_file, keys_folder: a key is there twice", param="router.keys_file")
    return KeyRing(entries)


def hash_of(key: str) -> str:
    """How a key stands in the file."""
    return HASH_PREFIX + sha256(key.encode()).hexdigest()


def _is_hex(text: str) -> bool:
    return all(one in "0123456789abcdef" for one in text)
