"""Authorities and certificates for tests, made by the openssl command line."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.config import TlsSection
from cluster.rpc.tls import PEER_NAME, Tls

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


@dataclass(frozen=True, slots=True)
class Authority:
    """One authority's folder; `issue` writes a node's certificate and key beside ca.pem and ca.key."""

    folder: Path

    @staticmethod
    def make(folder: Path) -> Authority:
        folder.mkdir()
        _openssl(folder, "req", "-x509", *_NEW_KEY, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
        return Authority(folder)

    def issue(self, node: str = "node", days: int = 2, name: str = PEER_NAME) -> TlsSection:
        """The files of a node; negative `days`: its certificate has expired."""
        alternative = f"subjectAltName=DNS:{name}"
        request = ("-subj", f"/CN={name}", "-addext", alternative, "-keyout", f"{node}.key", "-out", f"{node}.csr")
        _openssl(self.folder, "req", *_NEW_KEY, *request)
        signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-copy_extensions", "copy")
        given = ("-req", "-in", f"{node}.csr", "-out", f"{node}.pem", "-days", str(days))
        _openssl(self.folder, "x509", *given, *signer)
        files = (str(self.folder / file) for file in ("ca.pem", f"{node}.pem", f"{node}.key"))
        return TlsSection(**dict(zip(TlsSection.model_fields, files, strict=True)))


def unchecked(files: TlsSection, ca_file: str | None = None) -> Tls:
    """What the files hold, however wrong they are; `ca_file`: another authority to believe."""
    paths = (ca_file or files.ca_file, files.cert_file, files.key_file)
    return Tls(*(Path(str(path)).read_bytes() for path in paths))


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
