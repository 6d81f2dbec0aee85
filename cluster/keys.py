"""Keys at the edge: keys as they are on disk (one file of all tenants, a folder with a file of each, or both), the
environment's one key, and new keys.

`KeySource.start` reads the files and fails if one is broken; from then on a timer looks whether something has changed,
and what is broken changes nothing but the log. A mounted Kubernetes secret is such a folder: its hidden names are no
tenants' files, and it is renewed in one turn of a link.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TypeVar

from cluster.file_watch import FileWatch, Stamp, stamps_of
from engine.errors import ConfigError
from router.tenants import KEY_PREFIX, KeyRing, Tenant, hash_of, parse_tenant, parse_tenants, ring_of

KEY_VARIABLE = "STEELYARD_API_KEY"

Read = TypeVar("Read")


class KeySource:
    def __init__(
        self, file: str | None, variable: str | None, folder: str | None = None, classes: Collection[str] | None = None
    ) -> None:
        """`classes`: the names of router.classes, which tenants may be of; None: any."""
        self._file = Path(file).expanduser() if file else None
        self._folder = Path(folder).expanduser() if folder else None
        self._classes = classes
        self._own = (Tenant(name="default", keys=(hash_of(variable),)),) if variable else ()
        self._ring: KeyRing | None = ring_of(self._own) if self._own else None
        self._stamps: tuple[Stamp, ...] = ()
        self._watch: FileWatch | None = None

    def ring(self) -> KeyRing | None:
        """None: nobody has keys, everyone may ask."""
        return self._ring

    async def start(self) -> None:
        """ConfigError if something cannot be read or is wrong."""
        if self._file is not None or self._folder is not None:
            await asyncio.to_thread(self.reload)
            self._watch = FileWatch(self.reload, "API keys")

    async def stop(self) -> None:
        if self._watch is not None:
            await self._watch.stop()

    def reload(self) -> bool:
        """Read anew if something has changed; whether it had. ConfigError, once for each state of the files, and what
        was read last stays."""
        named = self._in_folder()
        stamps = _read(lambda: stamps_of([*([self._file] if self._file else ()), *named]), self._place)
        if stamps == self._stamps and self._ring is not None:
            return False
        self._stamps = stamps
        tenants = parse_tenants(_text(self._file, "router.keys_file")) if self._file else ()
        tenants += tuple(parse_tenant(path.name, _text(path, "router.keys_folder")) for path in named)
        self._check_classes(tenants)
        self._ring = ring_of((*tenants, *self._own))
        return True

    @property
    def _place(self) -> str:
        return "router.keys_file" if self._file else "router.keys_folder"

    def _in_folder(self) -> list[Path]:
        """Files of tenants, by their names."""
        if (folder := self._folder) is None:
            return []
        paths = _read(lambda: sorted(folder.iterdir()), "router.keys_folder")
        return [path for path in paths if not path.name.startswith(".") and path.is_file()]

    def _check_classes(self, tenants: Iterable[Tenant]) -> None:
        if self._classes is None:
            return
        for tenant in tenants:
            named = (*(tenant.allowed_classes or ()), *([tenant.slo_class] if tenant.slo_class else ()))
            if unknown := [name for name in named if name not in self._classes]:
                words = f"{self._place}: {tenant.name}: router.classes has no '{unknown[0]}'"
                raise ConfigError(words, param=self._place)


def _text(path: Path, place: str) -> str:
    return _read(lambda: path.read_text(encoding="utf-8"), place)


def _read(read: Callable[[], Read], place: str) -> Read:
    """ConfigError where the system or the text's encoding refuses."""
    try:
        return read()
    except (OSError, UnicodeDecodeError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else "a file is not UTF-8"
        raise ConfigError(f"{place}: {why}", param=place) from None


def key_of_environment() -> str | None:
    return os.environ.get(KEY_VARIABLE) or None


def new_key() -> str:
    """256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
