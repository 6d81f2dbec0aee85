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


def mount(folder: Path, version: str, files: dict[str, str]) -> None:
    """As Kubernetes does with a secret: files of a new folder, a link turned to it, and links through that."""
    (folder / version).mkdir(parents=True)
    for name, text in files.items():
        (folder / version / name).write_text(text)
    (folder / "..data_tmp").symlink_to(version)
    (folder / "..data_tmp").rename(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")


def test_a_mounted_secret_is_a_file_for_each_tenant_and_is_read_again_when_renewed(tmp_path: Path) -> None:
    plain, hashed, renewed, listed = (new_key() for _ in range(4))
    folder, file = tmp_path / "secret", tmp_path / "keys.yaml"
    write(file, listed)
    mount(folder, "..1", {"team": f"{plain}\n", "batch": f'keys: ["{hash_of(hashed)}"]\nslo_class: batch\n'})
    source = KeySource(str(file), None, str(folder), {"batch"})
    assert source.reload() and not source.reload()
    assert [whose(source.ring(), key) for key in (plain, hashed, listed)] == ["team", "batch", "a"]
    mount(folder, "..2", {"team": f"{hash_of(renewed)}\n", "batch": f"{hashed}"})
    assert source.reload()
    assert [whose(source.ring(), key) for key in (plain, renewed, hashed)] == [None, "team", "batch"]
    mount(folder, "..3", {"team": "keys: [", "batch": hashed})
    with pytest.raises(ConfigError, match="keys_folder: team"):
        source.reload()
    assert whose(source.ring(), renewed) == "team"


@pytest.mark.parametrize("text", ["slo_class: gold", "allowed_classes: [batch, gold]", "keys: [sk-pasted]", "- 1"])
def test_what_is_wrong_in_a_tenants_file_is_told_without_its_content(tmp_path: Path, text: str) -> None:
    (tmp_path / "team").write_text(text)
    with pytest.raises(ConfigError, match=r"router\.keys_folder: team") as caught:
        KeySource(None, None, str(tmp_path), {"batch"}).reload()
    assert "pasted" not in caught.value.message


async def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys_file"):
        await KeySource(str(tmp_path / "none"), None).start()


def test_the_environments_key_alone_is_enough() -> None:
    assert KeySource(None, None).ring() is None
    assert whose(KeySource(None, "sk-own").ring(), "sk-own") == "default"
