"""The certificate authority of the node channel: its files, and what it signs."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from controller import privatefile
from controller.fleet import certificates
from controller.fleet.certificates import Issuer, NodePublicKey
from controller.fleet.errors import AuthorityUnusable
from controller.store.types import now

_KEY_FILE = "ca.key"
_BUNDLE_FILE = "ca.crt"  # the certificate of the key first, then those that are on their way in or out


class Authority:
    """Signs for the channel. A bundle of several certificates lets nodes trust the next authority before it signs."""

    def __init__(self, issuer: Issuer, bundle: list[x509.Certificate]) -> None:
        self._issuer = issuer
        self.bundle = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in bundle)  # PEM
        self.pin = certificates.spki(issuer.key.public_key())

    def node_certificate(self, key: NodePublicKey, node_id: str, lifetime: timedelta) -> x509.Certificate:
        return certificates.node_certificate(self._issuer, key, node_id, now(), lifetime)

    def server_chain(self) -> tuple[bytes, bytes]:
        """A new server key and the chain for it, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = certificates.server_certificate(self._issuer, key.public_key(), now())
        chain = leaf.public_bytes(Encoding.PEM) + self._issuer.certificate.public_bytes(Encoding.PEM)
        return certificates.key_pem(key), chain


def create(directory: Path) -> Authority:
    """Make a new authority in the directory; raise AuthorityUnusable where there is one already."""
    key_file, bundle_file = directory / _KEY_FILE, directory / _BUNDLE_FILE
    if key_file.exists() or bundle_file.exists():
        raise AuthorityUnusable(f"{directory} holds an authority already: every node trusts it, so it is kept")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.authority_certificate(key, now(), certificates.CHANNEL_AUTHORITY)
    privatefile.write(bundle_file, certificate.public_bytes(Encoding.PEM))
    try:
        privatefile.write(key_file, certificates.key_pem(key))
    except OSError:
        bundle_file.unlink()
        raise
    return Authority(Issuer(certificate, key), [certificate])


def load(directory: Path) -> Authority:
    """Read the authority; raise AuthorityUnusable with what to do about it."""
    key_file, bundle_file = directory / _KEY_FILE, directory / _BUNDLE_FILE
    try:
        if stat.S_IMODE(key_file.stat().st_mode) & 0o077:
            raise AuthorityUnusable(f"{key_file} can be read by others: run chmod 600 {key_file}")
        key = load_pem_private_key(key_file.read_bytes(), password=None)
        bundle = x509.load_pem_x509_certificates(bundle_file.read_bytes())
    except OSError as error:
        raise AuthorityUnusable(f"{error.filename}: {error.strerror}: restore it, or run init for a new one") from error
    except (ValueError, TypeError) as error:
        raise AuthorityUnusable(f"{directory}: {_KEY_FILE} or {_BUNDLE_FILE} is damaged: restore them") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuthorityUnusable(f"{key_file} is not an elliptic curve key: restore it")
    own = [certificate for certificate in bundle if _public(certificate.public_key()) == _public(key.public_key())]
    if not own:
        raise AuthorityUnusable(f"{bundle_file} has no certificate of {key_file}: restore them together")
    if own[0].not_valid_after_utc <= now():
        raise AuthorityUnusable(f"{bundle_file} expired on {own[0].not_valid_after_utc:%Y-%m-%d}")
    return Authority(Issuer(own[0], key), bundle)


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]
