"""Answers that are none: each becomes one line that says what to do."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from cryptography.hazmat.primitives.serialization import Encoding

from agent.client.api import Api
from agent.client.errors import Refused, Unreachable

from .conftest import PASSWORD, Cli, FakeController, error


async def test_no_controller_there_is_told_with_the_address(cli: Cli) -> None:
    url = f"http://127.0.0.1:{unused_port()}"

    outcome = await cli("login", "--url", url, "--password-stdin", "alice", stdin=f"{PASSWORD}\n")

    assert outcome.status == 1
    assert f"cannot reach {url}" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: error(503, "the database is away"), "the database is away"),
        (lambda: web.Response(status=502, text="<html>bad gateway"), "answered 502"),
        (lambda: web.Response(text="<html>welcome"), "something else than a SkynetVPN controller"),
        (lambda: web.json_response([{"id": 7}]), "something else than a SkynetVPN controller"),
        (lambda: web.Response(status=301, headers={"Location": "https://vpn.example.org"}), "https://vpn.example.org"),
    ],
    ids=["its own words", "a proxy's error", "no JSON", "other JSON", "redirect"],
)
async def test_every_other_answer_fails_in_one_line(
    logged_in: Cli, controller: FakeController, answer: Callable[[], web.Response], words: str
) -> None:
    controller.answers["GET /servers"] = answer

    outcome = await logged_in("servers")

    assert outcome.status == 1
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


async def test_too_many_requests_say_when_to_come_back(controller: FakeController) -> None:
    controller.answers["GET /servers"] = lambda: web.json_response(
        {"error": "too many requests", "code": 429}, status=429, headers={"Retry-After": "7"}
    )
    async with Api(controller.url, token="t") as api:
        with pytest.raises(Refused, match="too many requests; try again in 7 s"):
            await api.servers()


async def test_an_id_cannot_lead_to_another_path(controller: FakeController) -> None:
    async with Api(controller.url, token="a-token") as api:
        with pytest.raises(Refused) as caught:
            await api.connection("../servers")
    assert caught.value.status == 404
    assert controller.seen("GET /servers") == []


async def test_a_certificate_counts_only_with_its_own_authority(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = TestServer(FakeController().app(), scheme="https")
    await server.start_server(ssl=context)
    url = f"https://localhost:{server.port}"
    try:
        async with Api(url) as api:
            with pytest.raises(Unreachable, match="--ca FILE"):
                await api.login("alice", PASSWORD)
        async with Api(url, ca=certificate) as api:
            assert (await api.login("alice", PASSWORD)).token
    finally:
        await server.close()


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost that is its own authority."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (directory / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return directory / "cert.pem", directory / "key.pem"
