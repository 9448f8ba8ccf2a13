"""The keys of OpenVPN's clients and servers: against the cryptography itself, and against the real program."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import subprocess
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from ipaddress import ip_network
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from controller.fleet import certificates, tlscrypt
from controller.fleet.errors import CertificateRequestInvalid
from controller.fleet.nodes import NodeSpec
from controller.fleet.service import Fleet
from controller.fleet.settings import FleetSettings
from controller.fleet.tables import FleetKeyRow
from controller.fleet.vpnkeys import IPSEC_PSK, VpnKeys, load_keys, open_key
from controller.secretbox import SecretBox, SecretUnreadable
from controller.store.database import Database, open_database
from controller.store.types import now
from tests.support.host import Host
from tests.support.netns import wait_until
from tests.support.node_port import signing_request

YEAR = timedelta(days=365)
NODE = "0192d1c0-0000-7000-8000-000000000001"


@pytest.fixture
async def keys(database: Database) -> VpnKeys:
    return await load_keys(database)


@pytest.fixture
async def second(database: Database, secrets: SecretBox) -> AsyncIterator[Database]:
    """The same file as another controller opens it."""
    opened = open_database(str(database.engine.url), secrets)
    yield opened
    await opened.close()


def body(pem: str) -> bytes:
    return base64.b64decode("".join(line for line in pem.splitlines() if not line.startswith("-----")))


def unwrapped(server_key: bytes, wrapped: bytes) -> bytes:
    """What a server does with the wrapped key that a client shows, written from the specification."""
    tag, content, length = wrapped[:32], wrapped[32:-2], wrapped[-2:]
    assert int.from_bytes(length) == len(wrapped)
    decryptor = Cipher(AES(server_key[:32]), CTR(tag[:16])).decryptor()
    plain = decryptor.update(content) + decryptor.finalize()
    assert hmac.digest(server_key[64:96], length + plain, hashlib.sha256) == tag
    return plain


def purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def common_name(certificate: x509.Certificate) -> str:
    (attribute,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(attribute.value)


async def test_every_controller_has_the_same_keys(database: Database, second: Database) -> None:
    first, other = await asyncio.gather(load_keys(database), load_keys(second))
    again = await load_keys(second)
    assert first.ca == other.ca == again.ca
    assert first.tls_crypt_server_key == other.tls_crypt_server_key == again.tls_crypt_server_key


async def test_the_keys_rest_sealed_and_open_only_with_the_secret(
    database: Database, keys: VpnKeys, secrets: SecretBox
) -> None:
    async with database.read() as session:
        rows = {row.name: row for row in await session.scalars(sa.select(FleetKeyRow))}
    assert set(rows) == {"vpn_authority", "tls_crypt_v2", IPSEC_PSK}
    assert body(keys.tls_crypt_server_key) == open_key(secrets, rows["tls_crypt_v2"])
    assert all(open_key(secrets, row) not in row.sealed_key for row in rows.values())
    database.secrets = SecretBox({"k2": bytes(range(32))}, "k2")
    with pytest.raises(SecretUnreadable):
        await load_keys(database)


async def test_nothing_is_sealed_with_keys_that_do_not_open_what_is_there(database: Database) -> None:
    settings = FleetSettings(channel_address="127.0.0.1:8443", ipv4_pool=ip_network("10.66.0.0/16"))
    spec = NodeSpec(name="fra1", country="DE", city="Frankfurt")
    await Fleet(database, bytes(32), settings).issue_join_token(spec)
    right, database.secrets = database.secrets, SecretBox({"k1": bytes(range(32))}, "k1")
    with pytest.raises(SecretUnreadable):
        await load_keys(database)
    database.secrets = right
    await load_keys(database)


async def test_a_psk_made_by_default_is_long_random_and_typeable(database: Database, keys: VpnKeys) -> None:
    async with database.read() as session:
        psk = open_key(database.secrets, await session.get_one(FleetKeyRow, IPSEC_PSK)).decode()
    assert len(psk) == 20
    assert psk.isascii() and psk.replace("-", "").replace("_", "").isalnum()


def test_a_client_certificate_says_its_name_and_is_for_clients_only(keys: VpnKeys) -> None:
    made = keys.client_certificate("alice", YEAR)
    certificate = x509.load_pem_x509_certificate(made.certificate.encode())
    assert common_name(certificate) == "alice"
    assert purposes(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert made.fingerprint == certificate.fingerprint(hashes.SHA256())
    private = load_pem_private_key(made.private_key.encode(), password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == certificate.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(keys.ca.encode()))
    assert abs(certificate.not_valid_after_utc - now() - YEAR) < timedelta(minutes=1)
    assert made.private_key not in repr(made)


def test_no_certificate_outlives_the_authority(keys: VpnKeys) -> None:
    made = keys.client_certificate("alice", timedelta(days=36500))
    certificate = x509.load_pem_x509_certificate(made.certificate.encode())
    assert certificate.not_valid_after_utc == x509.load_pem_x509_certificate(keys.ca.encode()).not_valid_after_utc


def test_a_server_certificate_takes_only_the_key_of_the_request(keys: VpnKeys) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    stranger = x509.SubjectAlternativeName([x509.DNSName("alice"), x509.DNSName("*")])
    request = signing_request(key, "another-node", stranger, x509.BasicConstraints(ca=True, path_length=None))
    issued = keys.server_certificate(request, NODE)
    assert common_name(issued) == NODE
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [f"vpn://skynetvpn/node/{NODE}"]
    assert purposes(issued) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert issued.public_key() == key.public_key()


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        b"x" * (certificates.MAX_REQUEST_BYTES + 1),
        signing_request(rsa.generate_private_key(65537, 1024)),
        signing_request(ec.generate_private_key(ec.SECP224R1())),
    ],
    ids=["empty", "damaged", "oversized", "rsa", "weak curve"],
)
def test_a_bad_request_gets_no_certificate(keys: VpnKeys, request_: bytes) -> None:
    with pytest.raises(CertificateRequestInvalid):
        keys.server_certificate(request_, NODE)


def test_a_node_channel_certificate_is_no_vpn_certificate(keys: VpnKeys) -> None:
    """Another authority: who may run a node may not log in as its client, nor the other way round."""
    authority = ec.generate_private_key(ec.SECP256R1())
    channel = certificates.authority_certificate(authority, now(), certificates.CHANNEL_AUTHORITY)
    verifier = PolicyBuilder().store(Store([channel])).build_client_verifier()
    made = keys.client_certificate("alice", YEAR)
    with pytest.raises(VerificationError):
        verifier.verify(x509.load_pem_x509_certificate(made.certificate.encode()), [])


def test_a_client_key_opens_with_the_server_key(keys: VpnKeys) -> None:
    server_key = body(keys.tls_crypt_server_key)
    first, second = (body(keys.tls_crypt_client_key()) for _ in range(2))
    plain = unwrapped(server_key, first[256:])
    assert plain[:256] == first[:256] != second[:256]
    assert plain[256] == 1 and abs(int.from_bytes(plain[257:]) - now().timestamp()) < 60


def test_our_wrapping_is_that_of_the_real_program(tmp_path: Path) -> None:
    server, client = tmp_path / "server.key", tmp_path / "client.key"
    openvpn("--genkey", "tls-crypt-v2-server", str(server))
    openvpn("--tls-crypt-v2", str(server), "--genkey", "tls-crypt-v2-client", str(client))
    server_key, theirs = body(server.read_text()), body(client.read_text())
    assert len(tlscrypt.new_server_key()) == len(server_key)
    made_at = int.from_bytes(unwrapped(server_key, theirs[256:])[257:])
    assert tlscrypt.wrap(server_key, theirs[:256], made_at) == theirs[256:]
    assert len(body(tlscrypt.new_client_key_pem(server_key))) == len(theirs)
    assert tlscrypt.server_key_pem(server_key).strip() == server.read_text().strip()


def says(log: Path, words: str) -> bool:
    return words in log.read_text()


def openvpn(*arguments: str) -> None:
    subprocess.run(["openvpn", *arguments], check=True, capture_output=True, timeout=30)


@pytest.mark.netns
def test_a_real_client_shakes_hands_with_a_real_server(keys: VpnKeys, tmp_path: Path) -> None:
    """With nothing but what the controller gives to a node and to a client."""
    key = ec.generate_private_key(ec.SECP256R1())
    server_certificate = keys.server_certificate(signing_request(key), NODE)
    made = keys.client_certificate("alice", YEAR)
    common = ["dev null", "proto udp", "ping 1", "tls-version-min 1.3", "data-ciphers AES-256-GCM", "verb 4"]
    inline = {
        "server": {
            "ca": keys.ca,
            "cert": server_certificate.public_bytes(Encoding.PEM).decode(),
            "key": certificates.key_pem(key).decode(),
            "tls-crypt-v2": keys.tls_crypt_server_key,
        },
        "client": {
            "ca": keys.ca,
            "cert": made.certificate,
            "key": made.private_key,
            "tls-crypt-v2": keys.tls_crypt_client_key(),
        },
    }
    own = {
        "server": ["tls-server", "dh none", "local 127.0.0.1", "lport 1194", "remote-cert-tls client"],
        "client": [
            *("tls-client", "nobind", "remote 127.0.0.1 1194", "remote-cert-tls server"),
            f"verify-x509-name {NODE} name",
        ],
    }
    with Host("ovpn") as host:
        logs = {}
        for side in ("server", "client"):
            blocks = [f"<{name}>\n{text.strip()}\n</{name}>" for name, text in inline[side].items()]
            config, logs[side] = tmp_path / f"{side}.conf", tmp_path / f"{side}.log"
            config.write_text("\n".join([*common, *own[side], *blocks, ""]))
            host.start(logs[side], "openvpn", "--config", str(config))
        for side in ("server", "client"):
            wait_until(partial(says, logs[side], "Initialization Sequence Completed"), 60)
        assert "CN=alice" in logs["server"].read_text()
        assert f"CN={NODE}" in logs["client"].read_text()
        assert "TLSv1.3" in logs["client"].read_text()
