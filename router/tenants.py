"""Tenants: who may ask, known by their API keys.

1. `parse_tenants` reads the keys file (YAML) into a KeyRing. 2. `KeyRing.find` names the tenant of a key.

Keys are told by their SHA-256 only, so a file that is read by others gives none away. A slow hash is for passwords,
which can be guessed; a key of ours is 256 random bits, and nobody can try them all. Knows nothing of HTTP and files.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

import yaml
from pydantic import Field, ValidationError, field_validator

from engine.config import StrictModel
from engine.errors import ConfigError

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


OPEN = Tenant.model_construct(name="", keys=(), enabled=True, priority=0, limits=Limits())


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


def parse_tenants(text: str) -> KeyRing:
    """The keys file. ConfigError names the place of what is wrong, and shows nothing of its content."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"router.keys_file: no YAML{where}", param="router.keys_file") from None
    try:
        file = _File.model_validate({} if data is None else data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise ConfigError(f"router.keys_file: {place}: {first['msg']}", param="router.keys_file") from None
    return ring_of(file.tenants)


def ring_of(tenants: Iterable[Tenant]) -> KeyRing:
    """ConfigError for a name or a key that is there twice."""
    tenants = tuple(tenants)
    entries = tuple((bytes.fromhex(key[len(HASH_PREFIX) :]), tenant) for tenant in tenants for key in tenant.keys)
    if len({tenant.name for tenant in tenants}) < len(tenants):
        raise ConfigError("router.keys_file: two tenants have the same name", param="router.keys_file")
    if len({digest for digest, _ in entries}) < len(entries):
        raise ConfigError("router.keys_file: a key is there twice", param="router.keys_file")
    return KeyRing(entries)


def hash_of(key: str) -> str:
    """How a key stands in the file."""
    return HASH_PREFIX + sha256(key.encode()).hexdigest()


def _is_hex(text: str) -> bool:
    return all(one in "0123456789abcdef" for one in text)
