"""Keys at the edge: the keys file as it is on disk, the environment's one key, and new keys.

`KeySource.start` reads the file and fails if it is broken; from then on a timer looks whether it has changed, and a
broken one changes nothing but the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from pathlib import Path

from engine.errors import ConfigError
from router.tenants import KEY_PREFIX, KeyRing, Tenant, hash_of, parse_tenants, ring_of

KEY_VARIABLE = "STEELYARD_API_KEY"
RELOAD_S = 2.0

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]  # a secret that is mounted anew has another inode


class KeySource:
    def __init__(self, path: str | None, variable: str | None) -> None:
        self._path = Path(path).expanduser() if path else None
        self._own = (Tenant(name="default", keys=(hash_of(variable),)),) if variable else ()
        self._ring: KeyRing | None = ring_of(self._own) if self._own else None
        self._stamp: Stamp | None = None
        self._task: asyncio.Task[None] | None = None

    def ring(self) -> KeyRing | None:
        """None: nobody has keys, everyone may ask."""
        return self._ring

    async def start(self) -> None:
        """ConfigError if the file cannot be read or is wrong."""
        if self._path is not None:
            await asyncio.to_thread(self.reload)
            self._task = asyncio.create_task(self._watch(), name="keys-file")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def reload(self) -> bool:
        """Read the file if it has changed; whether it had. ConfigError, once for each state of the file, and what was
        read last stays."""
        assert self._path is not None
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"router.keys_file: {self._path}: {why}", param="router.keys_file") from None
        ring = parse_tenants(text)
        self._ring = KeyRing((*ring.entries, *(ring_of(self._own).entries)))
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_S)
            try:
                if await asyncio.to_thread(self.reload):
                    log.info("router.keys_file was read again")
            except ConfigError as error:
                log.warning("%s; the keys that were read before stay valid", error.message)


def key_of_environment() -> str | None:
    return os.environ.get(KEY_VARIABLE) or None


def new_key() -> str:
    """256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
