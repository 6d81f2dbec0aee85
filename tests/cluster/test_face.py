"""The HTTP face's edges: pages of other origins, and TLS."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from cluster.face_tls import Certificates, check_tls
from cluster.gateway import Server, server_config
from cluster.listener import listen
from engine.errors import ConfigError
from router.config import RouterConfig
from router.face import FaceTls
from router.gateway import create_app
from router.step_history import StepHistory
from router.tenants import KeyRing
from tests.cluster.certificates import Authority
from tests.router.fakes import COMPLETIONS, FakeGenerator, completion, make_app, text_model

PAGE = "https://chat.example.org"


def page_client(*origins: str) -> httpx.AsyncClient:
    config = RouterConfig.model_validate({"cors": {"allow_origins": list(origins)}})
    keys = KeyRing()
    app = create_app(
        FakeGenerator(), text_model(), config, steps=StepHistory(), wall_clock=lambda: 0.0, keys=lambda: keys
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def test_a_page_may_ask_without_a_key_whether_it_may_ask_and_reads_its_refusal() -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with page_client(PAGE) as http:
        preflight = await http.options(COMPLETIONS, headers=asked)
        refused = await http.post(COMPLETIONS, json=completion(), headers={"origin": PAGE})
        other = await http.options(COMPLETIONS, headers=asked | {"origin": "https://evil.example"})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)
    assert "access-control-allow-origin" not in other.headers


async def test_pages_are_told_nothing_unless_they_are_named() -> None:
    async with page_client() as http:
        reply = await http.post(COMPLETIONS, json=completion(), headers={"origin": PAGE})
    assert "access-control-allow-origin" not in reply.headers


async def test_the_api_is_served_by_tls_to_clients_of_the_right_authority(tmp_path: Path) -> None:
    files = Authority.make(tmp_path / "ca").issue(name="localhost")
    tls = FaceTls(cert_file=files.cert_file, key_file=files.key_file, client_ca_file=files.ca_file)
    check_tls(tls)
    listener = listen("127.0.0.1", 0)
    server = Server(server_config(make_app(FakeGenerator()), RouterConfig(tls=tls)))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"https://localhost:{listener.getsockname()[1]}/version"
    known, stranger = (ssl.create_default_context(cafile=files.ca_file) for _ in range(2))
    known.load_cert_chain(str(files.cert_file), files.key_file)
    try:
        async with httpx.AsyncClient(verify=known) as http:
            assert (await http.get(url)).json() == {"version": "1.2.3"}
        async with httpx.AsyncClient(verify=stranger) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url)
    finally:
        server.should_exit = True
        await serving
        listener.close()


def shown_serial(port: int, authority: str) -> str:
    """Of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=authority)
    plain = socket.create_connection(("127.0.0.1", port), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as connection:
        certificate = connection.getpeercert()
    assert certificate is not None
    return str(certificate["serialNumber"])


async def test_a_renewed_certificate_is_shown_without_a_restart_and_a_broken_one_is_not(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ca")
    files = authority.issue(name="localhost")
    tls = FaceTls(cert_file=files.cert_file, key_file=files.key_file)
    config = server_config(make_app(FakeGenerator()), RouterConfig(tls=tls))
    config.load()
    assert config.ssl is not None
    listener, server, certificates = listen("127.0.0.1", 0), Server(config), Certificates(tls, config.ssl)
    port, ca = listener.getsockname()[1], str(files.ca_file)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        first = await asyncio.to_thread(shown_serial, port, ca)
        assert not certificates.reload()
        await asyncio.to_thread(Path(str(files.key_file)).write_text, "torn")
        with pytest.raises(ConfigError, match=r"router\.tls"):
            certificates.reload()
        assert await asyncio.to_thread(shown_serial, port, ca) == first
        authority.issue(name="localhost")
        assert certificates.reload()
        assert await asyncio.to_thread(shown_serial, port, ca) != first
    finally:
        await certificates.stop()
        server.should_exit = True
        await serving
        listener.close()


def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path: Path) -> None:
    none = str(tmp_path / "none.pem")
    with pytest.raises(ConfigError, match=r"router\.tls"):
        check_tls(FaceTls(cert_file=none, key_file=none))
    with pytest.raises(ValidationError, match="go together"):
        FaceTls(cert_file=none)
