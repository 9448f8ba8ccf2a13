"""Certificates of the node channel and of VPN clients as values: what is taken from a request, and what we issue."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controller.fleet.errors import CertificateRequestInvalid
from shared.protocol import CONTROLLER_NAME

AUTHORITY_LIFETIME = timedelta(days=3652)
SERVER_LIFETIME = timedelta(days=30)
BACKDATED = timedelta(minutes=5)  # for hosts whose clock is behind
MAX_REQUEST_BYTES = 16384
CHANNEL_AUTHORITY, VPN_AUTHORITY = "SkynetVPN node channel", "SkynetVPN clients"  # names of issuers
_IDENTITY = "vpn://skynetvpn/node/"

_NOBODY = x509.Name([])

NodePublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey


@dataclass(frozen=True, slots=True)
class Identity:
    """What a node's certificate says: who, which certificate, and for how long."""

    node_id: str
    serial: str  # hex
    issued_at: datetime  # to the second
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Issuer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def key_from_request(pem: bytes) -> NodePublicKey:
    """Take the public key from a certificate request, and nothing else; raise CertificateRequestInvalid."""
    if len(pem) > MAX_REQUEST_BYTES:
        raise CertificateRequestInvalid(reason=f"it is longer than {MAX_REQUEST_BYTES} bytes")
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateRequestInvalid(reason="it is not a PKCS #10 request in PEM form") from error
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
            raise CertificateRequestInvalid(reason="its curve is not P-256 or P-384")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise CertificateRequestInvalid(reason="its key is not P-256, P-384 or Ed25519")
    try:
        valid = request.is_signature_valid
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        valid = False
    if not valid:
        raise CertificateRequestInvalid(reason="its signature is wrong")
    return key


def spki(key: NodePublicKey) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo (DER): how a key is pinned and recognised."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def authority_certificate(key: ec.EllipticCurvePrivateKey, now: datetime, issuer: str) -> x509.Certificate:
    name, public = _common_name(issuer), key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def server_certificate(issuer: Issuer, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
    name = x509.SubjectAlternativeName([x509.DNSName(CONTROLLER_NAME)])
    return _leaf(issuer, key, _NOBODY, name, ExtendedKeyUsageOID.SERVER_AUTH, now, SERVER_LIFETIME)


def node_certificate(
    issuer: Issuer, key: NodePublicKey, node_id: str, now: datetime, lifetime: timedelta
) -> x509.Certificate:
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_IDENTITY + node_id)])
    return _leaf(issuer, key, _NOBODY, name, ExtendedKeyUsageOID.CLIENT_AUTH, now, lifetime)


def vpn_client_certificate(
    issuer: Issuer, key: ec.EllipticCurvePublicKey, common_name: str, now: datetime, lifetime: timedelta
) -> x509.Certificate:
    return _leaf(issuer, key, _common_name(common_name), None, ExtendedKeyUsageOID.CLIENT_AUTH, now, lifetime)


def vpn_server_certificate(
    issuer: Issuer, key: NodePublicKey, node_id: str, now: datetime, lifetime: timedelta
) -> x509.Certificate:
    """The common name is what clients compare (openvpn(8), --verify-x509-name)."""
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_IDENTITY + node_id)])
    return _leaf(issuer, key, _common_name(node_id), name, ExtendedKeyUsageOID.SERVER_AUTH, now, lifetime)


def identity_from(certificate: x509.Certificate) -> Identity | None:
    """Read a certificate that the TLS handshake has verified; None where it is not a node's."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return None
    if len(names) != 1 or not names[0].startswith(_IDENTITY):
        return None
    try:
        node_id = str(UUID(names[0].removeprefix(_IDENTITY)))
    except ValueError:
        return None
    return Identity(
        node_id=node_id,
        serial=serial_of(certificate),
        issued_at=certificate.not_valid_before_utc + BACKDATED,
        expires_at=certificate.not_valid_after_utc,
    )


def serial_of(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _leaf(
    issuer: Issuer,
    key: NodePublicKey,
    subject: x509.Name,
    name: x509.SubjectAlternativeName | None,
    purpose: x509.ObjectIdentifier,
    now: datetime,
    lifetime: timedelta,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(min(now + lifetime, issuer.certificate.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    if name is not None:
        builder = builder.add_extension(name, critical=not subject)  # RFC 5280 §4.2.1.6: where the subject is empty
    return builder.sign(issuer.key, hashes.SHA256())


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
