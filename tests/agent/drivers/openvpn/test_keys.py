"""The server's key and certificate on disk: when one is asked for, and which is taken."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from agent.drivers.base import DriverError
from agent.drivers.openvpn.keys import Keys, fingerprints
from agent.errors import AgentError
from agent.identity import new_key, signing_request
from tests.support.openvpn import Authority


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "openvpn")


def requested(keys: Keys, authority: Authority) -> bytes:
    request = keys.request(authority.pem)
    assert request is not None
    return request


def install(
    keys: Keys, authority: Authority, life: timedelta = timedelta(days=365), age: timedelta = timedelta()
) -> None:
    certificate = authority.sign_server(requested(keys, authority), life, age)
    keys.install(certificate, authority.pem.encode())


def test_the_key_is_made_here_and_stays_private(keys: Keys, authority: Authority, tmp_path: Path) -> None:
    request = x509.load_pem_x509_csr(requested(keys, authority))
    public_key = request.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    assert public_key.curve.name == "secp256r1"
    assert request.is_signature_valid
    assert stat.S_IMODE((tmp_path / "openvpn").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "openvpn").iterdir()} == {0o600}


def test_a_request_that_got_no_answer_is_repeated_for_the_same_key(keys: Keys, authority: Authority) -> None:
    first, second = (x509.load_pem_x509_csr(requested(keys, authority)).public_key() for _ in range(2))
    assert first == second


def test_an_installed_certificate_is_used_until_half_of_its_life_is_over(keys: Keys, authority: Authority) -> None:
    assert keys.current(authority.pem) is None
    install(keys, authority)
    current = keys.current(authority.pem)
    assert current is not None
    assert keys.validity(current.name) == current.validity
    assert keys.request(authority.pem) is None
    assert keys.request(None) is None


@pytest.mark.parametrize(("age", "due"), [(140, False), (225, True), (364, True)])
def test_it_is_renewed_from_half_of_its_life_on(keys: Keys, authority: Authority, age: int, due: bool) -> None:
    install(keys, authority, age=timedelta(days=age))
    assert keys.current(authority.pem) is not None
    assert (keys.request(authority.pem) is not None) is due


def test_the_one_with_the_longest_life_is_current_and_the_rest_is_forgotten(
    keys: Keys, authority: Authority, tmp_path: Path
) -> None:
    install(keys, authority, age=timedelta(days=300))
    old = keys.current(authority.pem)
    install(keys, authority)
    new = keys.current(authority.pem)
    assert old is not None
    assert new is not None
    assert old != new
    keys.forget([new.name])
    assert [path.name for path in (tmp_path / "openvpn").iterdir()] == [new.name]
    keys.remove()
    assert list((tmp_path / "openvpn").iterdir()) == []


def test_one_that_has_ended_is_none(keys: Keys, authority: Authority) -> None:
    install(keys, authority, age=timedelta(days=366))
    assert keys.current(authority.pem) is None
    assert keys.request(authority.pem) is not None


def test_another_authority_needs_another_certificate(keys: Keys, authority: Authority) -> None:
    install(keys, authority)
    other = Authority()
    assert keys.current(other.pem) is None
    assert keys.request(other.pem) is not None
    assert keys.current(other.pem + authority.pem) is not None  # while one follows the other


def test_a_certificate_for_another_key_or_by_another_authority_is_refused(keys: Keys, authority: Authority) -> None:
    request = requested(keys, authority)
    ca = authority.pem.encode()
    with pytest.raises(DriverError, match="another key"):
        keys.install(authority.sign_server(signing_request(new_key())), ca)
    with pytest.raises(DriverError, match="not signed by the authority"):
        keys.install(Authority().sign_server(request), ca)
    with pytest.raises(DriverError, match="not a PEM certificate"):
        keys.install(b"nonsense", ca)
    assert keys.current(authority.pem) is None
    keys.install(authority.sign_server(request), ca)
    assert keys.current(authority.pem) is not None
    with pytest.raises(DriverError, match="no key waits"):
        keys.install(authority.sign_server(request), ca)


@pytest.mark.parametrize("content", [b"", b"issuer x\n", b"\xff\n", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_damaged_file_is_as_if_it_were_not_there(
    keys: Keys, authority: Authority, tmp_path: Path, content: bytes
) -> None:
    install(keys, authority)
    (path,) = (tmp_path / "openvpn").iterdir()
    path.write_bytes(content)
    assert keys.current(authority.pem) is None
    assert keys.request(authority.pem) is not None


def test_a_key_that_others_can_read_is_not_used(keys: Keys, authority: Authority, tmp_path: Path) -> None:
    install(keys, authority)
    (path,) = (tmp_path / "openvpn").iterdir()
    path.chmod(0o644)
    assert keys.current(authority.pem) is None
    (tmp_path / "openvpn").chmod(0o755)
    with pytest.raises(AgentError, match="can be read by others"):
        keys.request(authority.pem)


def test_fingerprints_of_a_bundle(authority: Authority) -> None:
    other = Authority()
    both = fingerprints(authority.pem) | fingerprints(other.pem)
    assert len(both) == 2
    assert fingerprints(authority.pem + "between\n" + other.pem) == both
    assert fingerprints("") == set()
    with pytest.raises(DriverError):
        fingerprints("-----BEGIN CERTIFICATE-----\nA\n-----END CERTIFICATE-----\n")
