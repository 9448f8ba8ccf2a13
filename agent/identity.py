"""The keys and certificates of this host on its disk, and the TLS context made of them."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path

from agent import certificates, files
from agent.errors import AgentError
from shared.keys import InvalidKey, PrivateKey, decode_key

CONFIG = "agent.yaml"
WIREGUARD_KEY = "wireguard.key"


@dataclass(frozen=True, slots=True)
class Pair:
    """A private key, its certificate and the CA that they belong to, as files."""

    key: Path
    certificate: Path
    ca: Path


class Identity:
    """The current pair, and during a renewal the next one; a pair is given up only when the next one was accepted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.current = Pair(directory / "node.key", directory / "node.crt", directory / "ca.crt")
        self.next = Pair(directory / "node.next.key", directory / "node.next.crt", directory / "ca.next.crt")
        self._wireguard_key = directory / WIREGUARD_KEY
        self._public_key = directory / "wireguard.pub"

    def recover(self) -> None:
        """Finish a promotion that a crash cut in two: its order is CA, key, certificate."""
        if self.pending() and not self.next.ca.exists():
            self.next.key.replace(self.current.key)
        if self.next.certificate.exists() and not self.next.key.exists():
            self.next.certificate.replace(self.current.certificate)
            files.sync_directory(self.directory)

    def enrolled(self) -> bool:
        return self.current.certificate.exists()

    def wireguard_key(self) -> PrivateKey:
        """Read the key of the tunnels; raise AgentError where it is missing, exposed or not a key."""
        try:
            return PrivateKey.parse(files.read_private(self._wireguard_key).decode("ascii").strip())
        except (InvalidKey, UnicodeDecodeError) as error:
            raise AgentError(f"{self._wireguard_key} is not a WireGuard private key: {error}") from error

    def ensure_wireguard_key(self) -> None:
        if not self._wireguard_key.exists():
            self.store_wireguard_key(PrivateKey.generate())

    def store_wireguard_key(self, key: PrivateKey) -> None:
        files.write_private(self._wireguard_key, key.reveal().encode() + b"\n")

    def public_key(self) -> bytes:
        """The public half, from a file: the library that computes it would stay in memory for good."""
        key = self.wireguard_key()
        mark = hashlib.blake2b(key.raw, digest_size=16).hexdigest()
        with contextlib.suppress(OSError, ValueError):
            text, made_from = self._public_key.read_text().split()
            if made_from == mark:
                return decode_key(text)
        public = key.public()
        files.write_private(self._public_key, f"{public} {mark}\n".encode())
        return public.raw

    def ensure_key(self, path: Path) -> bytes:
        """The PEM of the private key at `path`, made now where there is none."""
        if not path.exists():
            files.write_private(path, new_key())
        return files.read_private(path)

    def store(self, pair: Pair, certificate: bytes, ca: bytes) -> None:
        """Store what belongs to the key that is already there; the certificate last, it makes the pair complete."""
        certificates.validity(certificate)
        files.write_private(pair.ca, ca)
        files.write_private(pair.certificate, certificate)

    def pending(self) -> bool:
        """Whether a renewed pair waits for its first use."""
        return self.next.certificate.exists() and self.next.key.exists()

    def promote(self) -> None:
        self.next.ca.replace(self.current.ca)
        self.next.key.replace(self.current.key)
        self.next.certificate.replace(self.current.certificate)
        files.sync_directory(self.directory)

    def discard_next(self) -> None:
        for path in (self.next.certificate, self.next.key, self.next.ca):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def validity(self) -> certificates.Validity:
        try:
            return certificates.validity(self.current.certificate.read_bytes())
        except (OSError, certificates.InvalidCertificate) as error:
            raise AgentError(f"{self.current.certificate}: {error}; enrol this host again") from error

    def tls(self, pair: Pair) -> ssl.SSLContext:
        files.read_private(pair.key)  # refuses a key that others can read
        try:
            context = client_context(pair.ca.read_text())
            context.load_cert_chain(pair.certificate, pair.key)
        except (OSError, ssl.SSLError) as error:
            raise AgentError(f"{pair.certificate} and {pair.key} cannot be used: {error}") from error
        return context


def client_context(ca: str) -> ssl.SSLContext:
    """TLS 1.3 to a controller that shows a certificate of this CA and of no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca)
    return context


def new_key() -> bytes:
    """A P-256 private key as PEM."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def signing_request(key: bytes) -> bytes:
    """A CSR that proves the key; who it is for is the controller's decision, so it names nobody."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = serialization.load_pem_private_key(key, None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise AgentError("the node key is not a P-256 key: remove it and enrol this host again")
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(private, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)
