"""The certificate of the HTTP face, as it is on disk: a renewed one is shown to new connections, without a restart.

1. `check_tls` says at the start whether the files can be used; 2. from then on a timer looks whether they have changed;
3. broken ones (or a certificate whose key has not come yet) change nothing but the log, and are looked at again.

Authorities of clients that come anew are believed beside the old ones; to forget one takes a restart.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from cluster.file_watch import FileWatch, Stamp, stamps_of
from engine.errors import ConfigError
from router.face import FaceTls


def check_tls(files: FaceTls) -> None:
    """ConfigError if they cannot be served with."""
    if files.cert_file is not None:
        load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)


def load_into(context: ssl.SSLContext, files: FaceTls) -> None:
    """For connections from now on. ConfigError for files that cannot be used."""
    assert files.cert_file is not None
    try:
        context.load_cert_chain(files.cert_file, files.key_file, password=lambda: "")
        if files.client_ca_file is not None:
            context.load_verify_locations(files.client_ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"router.tls: its files cannot be used: {error}", param="router.tls") from None


class Certificates:
    """Keeps a server's context at what is on disk."""

    def __init__(self, files: FaceTls, context: ssl.SSLContext) -> None:
        """`context` has been made of the files as they are now."""
        self._files = files
        self._context = context
        self._paths = [Path(one) for one in (files.cert_file, files.key_file, files.client_ca_file) if one]
        self._stamps = self._present()
        self._watch = FileWatch(self.reload, "router.tls")

    async def stop(self) -> None:
        await self._watch.stop()

    def reload(self) -> bool:
        """Take the files if they have changed; whether that was done. ConfigError, once for each state of them, where
        they cannot be used."""
        stamps = self._present()
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        check_tls(self._files)  # a broken half never gets into the context that serves
        load_into(self._context, self._files)
        return True

    def _present(self) -> tuple[Stamp, ...]:
        """Empty while one is missing."""
        try:
            return stamps_of(self._paths)
        except OSError:
            return ()
