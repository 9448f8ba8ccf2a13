"""The server's key and certificate: made here, signed by the controller, one file for both."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import certificates, files, identity
from agent.drivers.base import DriverError
from agent.errors import AgentError

_PENDING = "pending.key"
_PATTERN = "server.*.pem"
_ISSUER = "issuer "
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Certificate:
    """One that was installed. `issuer` is the SHA-256 of the certificate of the authority that signed it."""

    name: str
    issuer: str
    validity: certificates.Validity


class Keys:
    """All methods block for a moment: they read and write files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._jitter = certificates.jitter()

    def current(self, ca: str) -> Certificate | None:
        """The certificate of this authority that is valid for the longest time."""
        authorities = fingerprints(ca)
        found = [
            each for each in self._installed() if each.issuer in authorities and each.validity.not_after > time.time()
        ]
        return max(found, key=lambda each: each.validity.not_after, default=None)

    def request(self, ca: str | None) -> bytes | None:
        """A signing request where one is due: there is no certificate, or half of its life is over, or another
        authority signed it. The key that it proves waits for the answer."""
        installed = self._installed()
        if ca is None:
            current = max(installed, key=lambda each: each.validity.not_after, default=None)
        else:
            current = self.current(ca)
        if current is not None and time.time() < current.validity.renew_at(self._jitter):
            return None
        files.make_private_directory(self._directory)
        pending = self._directory / _PENDING
        if not pending.exists():
            files.write_private(pending, identity.new_key())
        return identity.signing_request(files.read_private(pending))

    def install(self, certificate: bytes, ca: bytes) -> None:
        """Store what the controller signed, after a look at whether it is for our key and by that authority."""
        pending = self._directory / _PENDING
        if not pending.exists():
            raise DriverError(f"no key waits for a certificate in {self._directory}")
        key = files.read_private(pending)
        issuer = _verified(certificate, key, ca)
        text = f"{_ISSUER}{issuer}\n".encode() + certificate.strip() + b"\n" + key
        name = f"server.{hashlib.sha256(certificate).hexdigest()[:16]}.pem"
        files.write_private(self._directory / name, text)
        pending.unlink()

    def validity(self, name: str) -> certificates.Validity | None:
        found = _read(self._directory / name)
        return None if found is None else found.validity

    def forget(self, keep: Sequence[str]) -> None:
        """Take away all certificates and their keys but these."""
        for path in self._directory.glob(_PATTERN):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        self.forget(())
        (self._directory / _PENDING).unlink(missing_ok=True)

    def _installed(self) -> list[Certificate]:
        read = (_read(path) for path in self._directory.glob(_PATTERN))
        return [each for each in read if each is not None]


def fingerprints(pem: str) -> set[str]:
    """SHA-256 of each certificate in the text."""
    blocks = (block.partition(_END)[0] for block in pem.split(_BEGIN)[1:])
    try:
        return {hashlib.sha256(ssl.PEM_cert_to_DER_cert(f"{_BEGIN}{block}{_END}\n")).hexdigest() for block in blocks}
    except ValueError as error:
        raise DriverError("the authority's certificate is not PEM") from error


def _read(path: Path) -> Certificate | None:
    """None where the file is not one of ours: it is as if it were not there, and another is asked for."""
    try:
        text = files.read_private(path)
        first, _, rest = text.decode("ascii").partition("\n")
        validity = certificates.validity(rest.encode())
    except (AgentError, ValueError):
        return None
    return Certificate(path.name, first.removeprefix(_ISSUER), validity) if first.startswith(_ISSUER) else None


def _verified(certificate: bytes, key: bytes, ca: bytes) -> str:
    """The fingerprint of the authority; raise DriverError where the certificate is of no use to this host."""
    # Only here: the library would stay in memory for good, and this happens twice a year.
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        signed = x509.load_pem_x509_certificate(certificate)
        authorities = x509.load_pem_x509_certificates(ca)
    except ValueError as error:
        raise DriverError("the controller's answer is not a PEM certificate") from error
    if signed.public_key() != load_pem_private_key(key, None).public_key():
        raise DriverError("the certificate is for another key than the one that was asked for")
    for authority in authorities:
        try:
            signed.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return authority.fingerprint(hashes.SHA256()).hex()
    raise DriverError("the certificate is not signed by the authority that came with it")
