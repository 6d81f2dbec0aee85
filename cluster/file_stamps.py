"""Whether files on disk are other ones than before: by their times, sizes and inodes.

A mounted Kubernetes secret is renewed by turning a link to another folder, so its files have other inodes then.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[str, int, int, int]


def stamps_of(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    """OSError for one that is not there."""
    found = [(path, path.stat()) for path in paths]
    return tuple((str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino) for path, stat in found)
