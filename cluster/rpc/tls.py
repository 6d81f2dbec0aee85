"""Mutual TLS between gateways and workers: one certificate of one private authority, shown by both ends of every call.

1. `load_tls` reads the files that `rpc.tls` names on this node, and tries them in a handshake with themselves: what is
   wrong is said at the start, by its key, and not by every call later;
2. servers ask each caller for a certificate of that authority; callers ask the same of servers, under PEER_NAME.
Workers are known by address and port, which the system chooses, so certificates carry one name for the whole cluster.
The secret and the incarnation are checked on top (auth.py). Contents of files are never logged.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.config import TlsSection
from engine.errors import ConfigError

PEER_NAME = "steelyard"  # the DNS name in every node's certificate
CHANNEL_OPTIONS = (("grpc.ssl_target_name_override", PEER_NAME),)
_NO_PASSWORD = ""  # given where OpenSSL would ask the terminal for one


@dataclass(frozen=True, slots=True)
class Tls:
    """What a node shows, and whom it believes: PEM."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    def for_server(self) -> grpc.ServerCredentials:
        """Callers without a certificate of our authority are refused before they can say anything."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)], self.ca, require_client_auth=True)

    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


def load_tls(files: TlsSection) -> Tls | None:
    """None if no files are named. Raises ConfigError that names the key at fault."""
    if files.ca_file is None or files.cert_file is None or files.key_file is None:
        return None
    tls = Tls(_read("ca_file", files.ca_file), _read("cert_file", files.cert_file), _read("key_file", files.key_file))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (server, client):
        _trust(context, files.ca_file)
        _show(context, files.cert_file, files.key_file)
    try:
        _shake_hands(server, client)
    except ssl.SSLCertVerificationError as error:
        raise _fault("cert_file", files.cert_file, f"is refused: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise _fault("cert_file", files.cert_file, f"cannot be used: {error.reason}") from None
    return tls


def _read(key: str, path: str) -> bytes:
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise _fault(key, path, f"cannot be read: {error.strerror}") from None
    wanted = b"PRIVATE KEY-----" if key == "key_file" else b"-----BEGIN CERTIFICATE-----"
    if wanted not in data:
        raise _fault(key, path, f"holds no {'private key' if key == 'key_file' else 'certificate'} in PEM")
    return data


def _trust(context: ssl.SSLContext, ca_file: str) -> None:
    try:
        context.load_verify_locations(Path(ca_file).expanduser())
    except ssl.SSLError as error:
        raise _fault("ca_file", ca_file, f"is not a certificate: {error.reason}") from None


def _show(context: ssl.SSLContext, cert_file: str, key_file: str) -> None:
    certificate, key = Path(cert_file).expanduser(), Path(key_file).expanduser()
    try:
        context.load_cert_chain(certificate, key, _NO_PASSWORD)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _fault("key_file", key_file, f"does not fit the certificate in {cert_file}") from None
        raise _fault("key_file", key_file, f"or {cert_file} is damaged, or has a password: {error.reason}") from None


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Each end's certificate as the other one judges it: authority, dates, purpose and name."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=PEER_NAME),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in list(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)


def _fault(key: str, path: str, what: str) -> ConfigError:
    return ConfigError(f"rpc.tls.{key}: {path} {what}", param=f"rpc.tls.{key}")
