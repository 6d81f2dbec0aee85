"""Mutual TLS: whose calls are taken, what wrong files are told, and a cluster that moves KV under it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest

from cluster.config import TlsSection
from cluster.rpc.channels import Channels
from cluster.rpc.client import worker_status
from cluster.rpc.server import WorkerServer
from cluster.rpc.tls import Tls, load_tls
from engine.errors import ConfigError, Unavailable
from kv_transfer.carriers.sample import Sample
from tests.cluster.certificates import Authority, unchecked
from tests.cluster.harness import local_cluster
from tests.cluster.test_rpc import SECRET, Called
from tests.cluster.tiny_model import write_tiny_model
from tests.kv_transfer.fakes import transfer


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "theirs")


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsSection:
    return authority.issue()


@asynccontextmanager
async def served(tls: Tls | None) -> AsyncIterator[str]:
    with transfer() as case:
        server, sample = WorkerServer(SECRET, "i1", tls), Sample()
        address = server.bind("127.0.0.1")
        await server.start(Called(), case.outbox, sample)
        try:
            yield address
        finally:
            await server.stop()
            sample.close()


async def ask(address: str, tls: Tls | None, secret: bytes = SECRET) -> None:
    channels = Channels(secret, tls)
    try:
        await worker_status(channels, address, "i1", timeout_s=5.0)
    finally:
        await channels.close()


# --- whose calls are taken ------------------------------------------------------------------------------------


async def test_a_peer_of_our_authority_is_answered_and_still_needs_the_secret(files: TlsSection) -> None:
    tls = load_tls(files)
    async with served(tls) as address:
        await ask(address, tls)
        with pytest.raises(Unavailable, match="secret"):
            await ask(address, tls, b"x" * 32)


async def test_callers_that_our_authority_does_not_vouch_for_are_refused_and_the_server_lives_on(
    authority: Authority, other: Authority, files: TlsSection
) -> None:
    tls, stranger, old = unchecked(files), other.issue(), authority.issue("old", days=-1)
    async with served(tls) as address:
        for caller in (unchecked(stranger, files.ca_file), unchecked(old), None, _Anonymous(tls.ca, b"", b"")):
            with pytest.raises(Unavailable, match="a peer could not be reached"):
                await ask(address, caller)
        await ask(address, tls)


class _Anonymous(Tls):
    """Believes our authority, and shows nothing."""

    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca)


async def test_servers_that_our_authority_does_not_vouch_for_are_not_talked_to(
    authority: Authority, other: Authority, files: TlsSection
) -> None:
    ours = unchecked(files)
    for wrong in (other.issue("fake"), authority.issue("old", days=-1), authority.issue("named", name="elsewhere")):
        async with served(unchecked(wrong, files.ca_file)) as address:
            with pytest.raises(Unavailable, match=r"(?i)certificate|hostname"):
                await ask(address, ours)


async def test_a_server_that_speaks_plain_text_is_told_apart(files: TlsSection) -> None:
    async with served(None) as address:
        with pytest.raises(Unavailable, match=r"(?i)ssl|tls|handshake"):
            await ask(address, unchecked(files))


# --- wrong files ----------------------------------------------------------------------------------------------


def test_no_files_are_no_tls() -> None:
    assert load_tls(TlsSection()) is None


def test_nothing_shows_the_private_key(files: TlsSection) -> None:
    tls = load_tls(files)
    assert tls is not None
    assert "PRIVATE" not in repr(tls)


def test_a_wrong_file_is_named_by_its_key(authority: Authority, other: Authority, files: TlsSection) -> None:
    folder, stranger = authority.folder, other.issue("wrong")
    (folder / "text").write_text("hello")
    (folder / "torn").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "folder").mkdir()
    old, named = authority.issue("expired", days=-1), authority.issue("elsewhere", name="elsewhere")
    for key in TlsSection.model_fields:
        told(files, key, "cannot be read: No such file", **{key: str(folder / "none")})
        told(files, key, "cannot be read: Is a directory", **{key: str(folder / "folder")})
        told(files, key, "in PEM", **{key: str(folder / "text")})
    told(files, "ca_file", "not a certificate", ca_file=str(folder / "torn"))
    told(files, "key_file", "does not fit the certificate", key_file=stranger.key_file)
    told(stranger, "cert_file", "is refused", ca_file=files.ca_file)
    told(old, "cert_file", "has expired")
    told(named, "cert_file", "not valid for 'steelyard'")


def told(files: TlsSection, key: str, what: str, **changes: str | None) -> None:
    with pytest.raises(ConfigError, match=rf"^rpc\.tls\.{key}: .*{what}") as caught:
        load_tls(files.model_copy(update=changes))
    assert caught.value.param == f"rpc.tls.{key}"


# --- a cluster ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["grpc", "shm"])
async def test_a_cluster_under_tls_moves_kv_and_gives_the_tokens_of_one_without(
    tmp_path: Path, files: TlsSection, carrier: str
) -> None:
    model = write_tiny_model(tmp_path / "model")
    overrides = {"model.name": str(model), "engine.runner": "thread", "kv_transfer.carrier": carrier}
    tls = {f"rpc.tls.{key}": value for key, value in files.model_dump().items()}
    texts = [await text_of(overrides), await text_of(overrides | tls)]
    assert texts[0] == texts[1]


async def text_of(overrides: Mapping[str, object]) -> str:
    """Of a request whose KV has come by the carrier of the overrides."""
    async with local_cluster(overrides) as cluster, httpx.AsyncClient(base_url=cluster.url, timeout=60) as client:
        body = {"model": "model", "prompt": list(range(50)), "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        reply = await client.post("/v1/completions", json=body)
        is_encrypted = cluster.workers["decode-0"]._server._credentials is not None
        assert is_encrypted == ("rpc.tls.ca_file" in overrides)
        totals = cluster.workers["decode-0"]._sides.status().transfers
        assert (totals.num_pulls >= 2, totals.num_failed) == (True, 0), "the canary's and ours"
        return reply.json()["choices"][0]["text"]
