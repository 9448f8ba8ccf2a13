"""The keys that all nodes or all clients share: the authority of VPN certificates, tls-crypt-v2, the first IPsec key.

They are in the database, sealed, so that every controller has the same; the node channel's authority is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from secrets import token_urlsafe

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from controller.desired import service as desired
from controller.fleet import certificates, tlscrypt
from controller.fleet.certificates import Issuer
from controller.fleet.tables import FleetKeyRow, NodeRow
from controller.secretbox import SecretBox
from controller.store.database import Database, Transaction
from controller.store.types import now

SERVER_LIFETIME = timedelta(days=365)  # nodes renew at half of it: a controller may be away for half a year
IPSEC_PSK = "ipsec_psk"
_AUTHORITY, _TLS_CRYPT = "vpn_authority", "tls_crypt_v2"
_PSK_BYTES = 15  # 20 characters, typed by hand into telephones


@dataclass(frozen=True, slots=True)
class ClientMaterial:
    """What an OpenVPN client logs in with; the private key is nowhere else."""

    private_key: str = field(repr=False)  # PEM
    certificate: str  # PEM
    fingerprint: bytes  # SHA-256 of the certificate's DER: how nodes know it


class VpnKeys:
    """Nothing here waits: the keys are in memory."""

    def __init__(self, issuer: Issuer, tls_crypt: bytes) -> None:
        self._issuer = issuer
        self._tls_crypt = tls_crypt
        self.ca = issuer.certificate.public_bytes(Encoding.PEM).decode()  # PEM
        self.tls_crypt_server_key = tlscrypt.server_key_pem(tls_crypt)

    def client_certificate(self, common_name: str, lifetime: timedelta) -> ClientMaterial:
        """A new key and a certificate that says nothing but the name; a node takes it by its fingerprint."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = certificates.vpn_client_certificate(self._issuer, key.public_key(), common_name, now(), lifetime)
        return ClientMaterial(
            private_key=certificates.key_pem(key).decode(),
            certificate=issued.public_bytes(Encoding.PEM).decode(),
            fingerprint=issued.fingerprint(hashes.SHA256()),
        )

    def server_certificate(self, request: bytes, node_id: str) -> x509.Certificate:
        """A node's, for the public key of its request and for nobody else's name.

        Raises CertificateRequestInvalid.
        """
        key = certificates.key_from_request(request)
        return certificates.vpn_server_certificate(self._issuer, key, node_id, now(), SERVER_LIFETIME)

    def tls_crypt_client_key(self) -> str:
        """A new tls-crypt-v2 key for one client (PEM), which every node takes."""
        return tlscrypt.new_client_key_pem(self._tls_crypt)


async def load_keys(database: Database) -> VpnKeys:
    """The fleet's keys; those that are not there yet are made, once, whichever controller comes first.

    Raises SecretUnreadable.
    """
    async with database.read() as session:
        rows = await _rows(session)
    if not {_AUTHORITY, _TLS_CRYPT, IPSEC_PSK} <= rows.keys():
        async with database.transaction() as tx:
            await _prove_secrets(tx)
            await _make(tx)
            rows = await _rows(tx.session)
    authority = rows[_AUTHORITY]
    key = load_der_private_key(open_key(database.secrets, authority), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    certificate = x509.load_pem_x509_certificate(authority.certificate or b"")
    return VpnKeys(Issuer(certificate, key), open_key(database.secrets, rows[_TLS_CRYPT]))


def open_key(secrets: SecretBox, row: FleetKeyRow) -> bytes:
    """Raises SecretUnreadable."""
    return secrets.open(row.sealed_key, **_place(row.name))


def seal_key(secrets: SecretBox, name: str, key: bytes) -> bytes:
    return secrets.seal(key, **_place(name))


def new_psk() -> str:
    return token_urlsafe(_PSK_BYTES)


async def _rows(session: AsyncSession) -> dict[str, FleetKeyRow]:
    return {row.name: row for row in await session.scalars(sa.select(FleetKeyRow))}


async def _prove_secrets(tx: Transaction) -> None:
    """Seal nothing new with keys that do not open what is there: they are another database's."""
    node_id = await tx.session.scalar(sa.select(NodeRow.id).limit(1))
    if node_id is not None:
        await desired.state(await tx.session.connection(), tx.secrets, desired.node_scope(node_id))


async def _make(tx: Transaction) -> None:
    """Of two controllers that do this at once the first one's keys stay."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.authority_certificate(key, now(), certificates.VPN_AUTHORITY)
    made: dict[str, tuple[bytes, bytes | None]] = {
        _AUTHORITY: (certificates.key_der(key), certificate.public_bytes(Encoding.PEM)),
        _TLS_CRYPT: (tlscrypt.new_server_key(), None),
        IPSEC_PSK: (new_psk().encode(), None),
    }
    connection = await tx.session.connection()
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    for name, (secret, pem) in made.items():
        await connection.execute(
            insert(FleetKeyRow)
            .values(name=name, sealed_key=seal_key(tx.secrets, name, secret), certificate=pem, created_at=now())
            .on_conflict_do_nothing()
        )


def _place(name: str) -> dict[str, str]:
    return {"table": FleetKeyRow.__tablename__, "column": "sealed_key", "row": name}
