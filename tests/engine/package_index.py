"""A small package index on this machine: wheels in a folder, and an HTTP server that pip and we can ask for them.

It tells what it was asked for, and can cut connections, stop half way, ignore ranges, or refuse.
"""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from engine.models.catalogue import CatalogueFile, CatalogueModel, CatalogueWheel

_PIECE_BYTES = 1 << 14


# --- wheels ---------------------------------------------------------------------------------------------------


def offer_wheels(folder: Path, files: Mapping[str, bytes], num_parts: int = 0) -> CatalogueModel:
    """Write a model's files into one wheel; with `num_parts`, the first is cut into as many wheels of their own."""
    (first, content), rest = next(iter(files.items())), dict(list(files.items())[1:])
    step = -(-len(content) // max(num_parts, 1))
    cut = {f"{first}.part{number:02}": content[number * step : (number + 1) * step] for number in range(num_parts)}
    packed = [rest, *({name: part} for name, part in cut.items())] if num_parts else [files]
    names = ["tiny-model", *(f"tiny-model-part{number}" for number in range(1, len(packed)))]
    wheels = tuple(_write_wheel(folder, name, part) for name, part in zip(names, packed, strict=True))
    described = [CatalogueFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    described[0] = CatalogueFile(first, len(content), described[0].sha256, tuple(cut))
    return CatalogueModel(wheels, tuple(described), "Apache-2.0")


def _write_wheel(folder: Path, package: str, files: Mapping[str, bytes]) -> CatalogueWheel:
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: absent-package\n"
    members = {f"{name}/data/{file}": data for file, data in files.items()} | {
        f"{name}-1.0.dist-info/METADATA": metadata.encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{member},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for member, data in members.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", record + f"{name}-1.0.dist-info/RECORD,,\n")
    whole = path.read_bytes()
    return CatalogueWheel(package, "1.0", len(whole), hashlib.sha256(whole).hexdigest())


# --- the server -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a wheel: its package's file, and the first byte asked for."""

    file: str
    start: int
    is_pip: bool


@dataclass(slots=True)
class PackageIndex:
    """How the server behaves, and what it was asked."""

    folder: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)  # bytes sent by the next connections, before they are cut
    stop_after: int | None = None  # bytes after which a connection stays silent until `resume`
    stopped: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    ignores_ranges: bool = False
    refuses_us: bool = False  # but not pip, which may have a login

    @property
    def environment(self) -> dict[str, str]:
        """Lets pip see this index and nothing else."""
        return {
            "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": f"{self.url}/simple", "PIP_TRUSTED_HOST": "127.0.0.1",
            "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip


@contextmanager
def serving(folder: Path) -> Iterator[PackageIndex]:
    index = PackageIndex(folder)

    class Handler(_Handler):
        behaviour = index

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        index.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield index
        finally:
            index.resume.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    behaviour: PackageIndex

    def do_GET(self) -> None:
        if self.path.startswith("/simple/"):
            return self._list(self.path.removeprefix("/simple/").strip("/"))
        return self._send(self.path.rpartition("/")[2])

    def log_message(self, format: str, *args: object) -> None:
        return None

    def _list(self, package: str) -> None:
        name = package.replace("-", "_")
        found = self.behaviour.folder.glob(f"{name}-1.0-*.whl")
        links = "".join(f'<a href="/files/{path.name}">{path.name}</a>' for path in found)
        body = f"<!DOCTYPE html><html><body>{links}</body></html>".encode()
        self.send_response(200 if links else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, file: str) -> None:
        index, content = self.behaviour, (self.behaviour.folder / file).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        is_pip = self.headers.get("User-Agent", "").startswith("pip/")
        index.asked.append(Asked(file, int(asked[1]) if asked else 0, is_pip))
        if index.refuses_us and not is_pip:
            return self.send_error(401)
        start = int(asked[1]) if asked and not index.ignores_ranges else 0
        if start:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        return self._write(content[start:])

    def _write(self, content: bytes) -> None:
        index = self.behaviour
        limit = min(index.cut_after.pop(0) if index.cut_after else len(content), len(content))
        for start in range(0, limit, _PIECE_BYTES):
            if index.stop_after is not None and start >= index.stop_after:
                index.stopped.set()
                index.resume.wait()
            try:
                self.wfile.write(content[start : min(start + _PIECE_BYTES, limit)])
            except OSError:  # whoever asked was killed
                break
        self.close_connection = True
