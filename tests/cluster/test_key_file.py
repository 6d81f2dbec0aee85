"""The keys file on disk: read again when it changes, and a broken one changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.keys import KeySource, new_key
from engine.errors import ConfigError
from router.tenants import KeyRing, hash_of


def write(path: Path, *keys: str) -> None:
    path.write_text("tenants:\n- name: a\n  keys:\n" + "".join(f'  - "{hash_of(key)}"\n' for key in keys))


def whose(ring: KeyRing | None, key: str) -> str | None:
    assert ring is not None
    found = ring.find(key.encode())
    return found.name if found else None


def test_a_changed_file_is_read_again_and_a_broken_one_keeps_the_last_keys(tmp_path: Path) -> None:
    path, first, second = tmp_path / "keys.yaml", new_key(), new_key()
    write(path, first)
    source = KeySource(str(path), "sk-own")
    assert source.reload()
    assert not source.reload()
    assert (whose(source.ring(), first), whose(source.ring(), "sk-own")) == ("a", "default")
    write(path, first, second)
    assert source.reload()
    assert whose(source.ring(), second) == "a"
    path.write_text("tenants: [")
    with pytest.raises(ConfigError):
        source.reload()
    assert whose(source.ring(), second) == "a"


async def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        await KeySource(str(tmp_path / "none"), None).start()


def test_the_environments_key_alone_is_enough() -> None:
    assert KeySource(None, None).ring() is None
    assert whose(KeySource(None, "sk-own").ring(), "sk-own") == "default"
