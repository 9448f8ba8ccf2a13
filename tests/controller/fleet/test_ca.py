"""The authority's files, and what it takes from a request."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from controller.fleet import ca, certificates
from controller.fleet.errors import AuthorityUnusable, CertificateRequestInvalid
from shared.protocol import CONTROLLER_NAME
from tests.support.node_port import signing_request

NODE = "01890a5d-ac96-774b-bcce-b302099a8057"


def issue(authority: ca.Authority, pem: bytes, hours: int = 1) -> x509.Certificate:
    return authority.node_certificate(certificates.key_from_request(pem), NODE, timedelta(hours=hours))


def test_the_files_are_private_and_load_again(tmp_path: Path) -> None:
    made = ca.create(tmp_path / "ca")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "ca").iterdir()} == {0o600}
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    loaded = ca.load(tmp_path / "ca")
    assert (loaded.pin, loaded.bundle) == (made.pin, made.bundle)


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    before = ca.create(tmp_path).bundle
    with pytest.raises(AuthorityUnusable, match="already"):
        ca.create(tmp_path)
    assert ca.load(tmp_path).bundle == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    ca.create(tmp_path)
    (tmp_path / "ca.key").chmod(mode)
    with pytest.raises(AuthorityUnusable, match="chmod 600"):
        ca.load(tmp_path)


@pytest.mark.parametrize("name", ["ca.key", "ca.crt"])
@pytest.mark.parametrize("content", [None, b"", b"-----BEGIN NOTHING-----\n"])
def test_damaged_or_missing_files_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    ca.create(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(AuthorityUnusable):
        ca.load(tmp_path)


def test_a_certificate_of_another_key_is_refused(tmp_path: Path) -> None:
    ca.create(tmp_path / "one")
    ca.create(tmp_path / "two")
    (tmp_path / "one" / "ca.crt").write_bytes((tmp_path / "two" / "ca.crt").read_bytes())
    with pytest.raises(AuthorityUnusable, match="no certificate"):
        ca.load(tmp_path / "one")


def test_a_bundle_may_hold_the_next_authority(tmp_path: Path) -> None:
    old, new = ca.create(tmp_path / "old"), ca.create(tmp_path / "new")
    (tmp_path / "new" / "ca.crt").write_bytes(old.bundle + new.bundle)
    loaded = ca.load(tmp_path / "new")
    assert loaded.pin == new.pin
    assert loaded.bundle == old.bundle + new.bundle
    issued = issue(loaded, signing_request(ec.generate_private_key(ec.SECP256R1())))
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(new.bundle))


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
)
def test_the_identity_is_ours_whatever_the_request_says(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    authority = ca.create(tmp_path)
    greedy = signing_request(
        key,
        "vpn://skynetvpn/node/00000000-0000-0000-0000-000000000000",
        x509.BasicConstraints(ca=True, path_length=None),
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier("vpn://skynetvpn/node/other")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    issued = issue(authority, greedy)
    extensions = issued.extensions
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [f"vpn://skynetvpn/node/{NODE}"]
    assert not list(issued.subject)
    identity = certificates.identity_from(issued)
    assert identity is not None
    assert identity.node_id == NODE
    assert issued.not_valid_before_utc <= datetime.now(UTC) - timedelta(minutes=4)
    assert timedelta(minutes=59) < identity.expires_at - datetime.now(UTC) <= timedelta(hours=1)


def test_serials_differ_for_the_same_request(tmp_path: Path) -> None:
    authority, request = ca.create(tmp_path), signing_request(ec.generate_private_key(ec.SECP256R1()))
    assert len({issue(authority, request).serial_number for _ in range(20)}) == 20


def test_the_server_certificate_has_the_fixed_name_and_is_no_identity(tmp_path: Path) -> None:
    _, chain = ca.create(tmp_path).server_chain()
    leaf, root = x509.load_pem_x509_certificates(chain)
    leaf.verify_directly_issued_by(root)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [CONTROLLER_NAME]
    assert certificates.identity_from(leaf) is None


def weak_rsa() -> bytes:
    return signing_request(rsa.generate_private_key(65537, 1024))


def strong_rsa() -> bytes:
    return signing_request(rsa.generate_private_key(65537, 2048))


def other_curve() -> bytes:
    return signing_request(ec.generate_private_key(ec.SECP256K1()))


def bad_signature() -> bytes:
    request = x509.load_pem_x509_csr(signing_request(ec.generate_private_key(ec.SECP256R1())))
    der = bytearray(request.public_bytes(Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)


def oversized() -> bytes:
    """Right in every way but its size."""
    names = x509.SubjectAlternativeName([x509.DNSName(f"{number}.example") for number in range(60_000)])
    pem = signing_request(ec.generate_private_key(ec.SECP256R1()), "host", names)
    assert len(pem) > 1_000_000
    return pem


@pytest.mark.parametrize(
    "pem",
    [weak_rsa, strong_rsa, other_curve, bad_signature, oversized, lambda: b"", lambda: b"nonsense"],
    ids=["rsa-1024", "rsa-2048", "secp256k1", "signature", "1 MB", "empty", "nonsense"],
)
def test_what_is_weak_or_wrong_is_refused(pem: object) -> None:
    assert callable(pem)
    with pytest.raises(CertificateRequestInvalid):
        certificates.key_from_request(pem())
