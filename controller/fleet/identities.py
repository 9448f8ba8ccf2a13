"""Who a host is: enrolment, admission of a certificate, its renewal, and the lock on an identity that two hosts use."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import sqlalchemy as sa
import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from controller.fleet import certificates
from controller.fleet.ca import Authority
from controller.fleet.certificates import Identity, NodePublicKey
from controller.fleet.errors import (
    CertificateRefused,
    JoinTokenRefused,
    NodeDisabled,
    NodeLocked,
    WireGuardKeyInvalid,
    WireGuardKeyTaken,
)
from controller.fleet.metrics import FleetMetrics
from controller.fleet.nodes import NodeStatus, printable
from controller.fleet.offer import Offer, known_protocols, scopes_of
from controller.fleet.settings import FleetSettings
from controller.fleet.tables import JoinTokenRow, NodeRow
from controller.store.database import Database, Topic, Transaction
from controller.store.types import now
from shared.keys import InvalidKey, PublicKey
from shared.protocol import Certificate, EnrolAnswer, EnrolRequest, Hello
from shared.resource import Protocol

_REMEMBERED_BOOTS = 64
_EVERYTHING = tuple(Protocol)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Admitted:
    """A node whose certificate is the one in use."""

    node_id: str
    name: str
    serial: str
    offer: Offer  # as it was stored when its session began
    allowed: tuple[Protocol, ...] = _EVERYTHING  # it may offer no other

    @property
    def scopes(self) -> tuple[str, ...]:
        return scopes_of(self.node_id, self.offer.protocols)


class _SecondHost(Exception):
    """Unwinds the transaction that found a second host, so that the lock is written in one of its own."""


class Identities:
    def __init__(
        self, database: Database, authority: Authority, settings: FleetSettings, metrics: FleetMetrics
    ) -> None:
        self._database = database
        self._authority = authority
        self._settings = settings
        self._metrics = metrics

    async def enrol(self, request: EnrolRequest, address: str) -> EnrolAnswer:
        """Exchange a join token for a certificate, once. The same key may ask again while the token lives: the answer
        to the first request may have been lost.

        Raises CertificateRequestInvalid, WireGuardKeyInvalid, WireGuardKeyTaken (all leave the token unused) and
        JoinTokenRefused.
        """
        key = certificates.key_from_request(request.csr)
        _check_wireguard_key(request.wireguard_public_key)
        async with self._database.transaction() as tx:
            row = await self._claim(tx, request, certificates.spki(key))
            if row is not None:
                answer, name = await self._answer(tx, row, request, key, address)
        if row is None:
            self._metrics.enrolments.labels("refused").inc()
            log.warning("fleet.enrolment_refused", token=request.token_id[:36], address=address)
            raise JoinTokenRefused
        self._metrics.enrolments.labels("accepted").inc()
        log.info("fleet.enrolled", node=name, node_id=answer.node_id, address=address)
        return answer

    async def admit(self, identity: Identity) -> Admitted:
        """Check the certificate of a new connection; the first use of a renewed one retires the one before.

        Raises CertificateRefused, NodeDisabled, NodeLocked.
        """
        try:
            async with self._database.transaction() as tx:
                return await self._admit(tx, identity)
        except _SecondHost as found:
            await self._lock(identity.node_id, str(found))
            raise NodeLocked from found

    async def hello(self, node: Admitted, hello: Hello, address: str) -> None:
        """Store what the host says of itself. Raises NodeLocked, WireGuardKeyInvalid, WireGuardKeyTaken."""
        if hello.wireguard_public_key:
            _check_wireguard_key(hello.wireguard_public_key)
        try:
            async with self._database.transaction() as tx:
                await _record_hello(tx, node.node_id, hello, address)
        except _SecondHost as found:
            await self._lock(node.node_id, str(found))
            raise NodeLocked from found

    async def renew(self, node: Admitted, request: bytes) -> Certificate:
        """A certificate for the node's next key; the present one stays valid until the next is used.

        Raises CertificateRequestInvalid, CertificateRefused.
        """
        key = certificates.key_from_request(request)
        issued = self._authority.node_certificate(key, node.node_id, self._settings.certificate_lifetime)
        async with self._database.transaction() as tx:
            renewed = await tx.session.execute(
                sa.update(NodeRow)
                .where(NodeRow.id == node.node_id, NodeRow.serial == node.serial)
                .values(next_serial=certificates.serial_of(issued))
            )
            if renewed.rowcount == 0:  # type: ignore[attr-defined]
                raise CertificateRefused
        log.info("fleet.certificate_renewed", node=node.name, expires_at=issued.not_valid_after_utc.isoformat())
        return Certificate(certificate=issued.public_bytes(Encoding.PEM), ca=self._authority.bundle)

    async def standing(self, node_ids: Collection[str]) -> dict[str, tuple[NodeStatus, str | None]]:
        """The status and the serial in use of those nodes that are there."""
        wanted, found = sorted(node_ids), {}
        async with self._database.connect() as connection:
            for start in range(0, len(wanted), 500):  # engines limit the parameters of a statement
                rows = await connection.execute(
                    sa.select(NodeRow.id, NodeRow.status, NodeRow.serial).where(
                        NodeRow.id.in_(wanted[start : start + 500])
                    )
                )
                found.update({row.id: (NodeStatus(row.status), row.serial) for row in rows})
        return found

    async def _claim(self, tx: Transaction, request: EnrolRequest, spki: bytes) -> JoinTokenRow | None:
        """The token, used up by this very request (certificate still None) or by an earlier one with the same key."""
        moment = now()
        valid = (
            JoinTokenRow.id == request.token_id,
            JoinTokenRow.secret_hash == hashlib.sha256(request.secret).digest(),
            JoinTokenRow.expires_at > moment,
        )
        # The condition is in the UPDATE: of many at once, exactly one changes the row.
        await tx.session.execute(
            sa.update(JoinTokenRow).where(*valid, JoinTokenRow.used_at.is_(None)).values(used_at=moment, used_spki=spki)
        )
        return await tx.session.scalar(sa.select(JoinTokenRow).where(*valid, JoinTokenRow.used_spki == spki))

    async def _answer(
        self, tx: Transaction, token: JoinTokenRow, request: EnrolRequest, key: NodePublicKey, address: str
    ) -> tuple[EnrolAnswer, str]:
        row = await tx.session.get_one(NodeRow, token.node_id)
        if token.certificate is None:
            await _take_wireguard_key(tx, row, request.wireguard_public_key)
            issued = self._authority.node_certificate(key, row.id, self._settings.certificate_lifetime)
            token.certificate = issued.public_bytes(Encoding.PEM)
            row.serial, row.next_serial = certificates.serial_of(issued), None
            row.certificate_expires_at = issued.not_valid_after_utc
            row.enrolled_at = row.last_seen_at = row.promoted_at = now()
            row.agent, row.address = printable(request.agent), address
            row.boot_id, row.former_boot_ids = None, ""
            if row.status == NodeStatus.LOCKED:  # a new identity: what two hosts shared is worthless now
                row.status = NodeStatus.ENABLED
            tx.touch(Topic.NODES)
        answer = EnrolAnswer(node_id=row.id, name=row.name, certificate=token.certificate, ca=self._authority.bundle)
        return answer, row.name

    async def _admit(self, tx: Transaction, identity: Identity) -> Admitted:
        row = await tx.session.get(NodeRow, identity.node_id)
        if row is None or row.serial is None or row.enrolled_at is None:
            raise CertificateRefused
        if row.status == NodeStatus.DISABLED:
            raise NodeDisabled
        if row.status == NodeStatus.LOCKED:
            raise NodeLocked
        if identity.serial == row.next_serial:
            row.serial, row.next_serial = row.next_serial, None
            row.promoted_at, row.certificate_expires_at = now(), identity.expires_at
            tx.touch(Topic.NODES)
        elif identity.serial != row.serial:
            earlier_enrolment = identity.issued_at < row.enrolled_at.replace(microsecond=0)
            promoted_now = row.promoted_at is not None and now() - row.promoted_at < self._settings.promotion_grace
            if earlier_enrolment or promoted_now:
                raise CertificateRefused
            raise _SecondHost("a certificate came back after its successor was in use")
        return Admitted(row.id, row.name, identity.serial, _offer(row), known_protocols(row.allowed.split()))

    async def _lock(self, node_id: str, reason: str) -> None:
        async with self._database.transaction() as tx:
            row = await tx.session.get_one(NodeRow, node_id)
            row.status = NodeStatus.LOCKED
            tx.touch(Topic.NODES)
        self._metrics.locks.inc()
        log.error("fleet.node_locked", node=row.name, node_id=node_id, reason=reason)


async def _record_hello(tx: Transaction, node_id: str, hello: Hello, address: str) -> None:
    row = await tx.session.get_one(NodeRow, node_id)
    if hello.boot_id != row.boot_id:
        former = row.former_boot_ids.split()
        if hello.boot_id in former:
            raise _SecondHost("a boot came back after a later one was seen")
        if row.boot_id:
            row.former_boot_ids = " ".join([*former, row.boot_id][-_REMEMBERED_BOOTS:])
        row.boot_id = hello.boot_id
    if hello.wireguard_public_key:
        await _take_wireguard_key(tx, row, hello.wireguard_public_key)
    if row.address != address:
        row.address = address
        tx.touch(Topic.NODES)
    row.agent, row.last_seen_at = printable(hello.agent), now()


def _offer(row: NodeRow) -> Offer:
    return Offer(known_protocols(row.protocols.split()), tuple(row.ssh_host_keys.splitlines()), row.ledger)


async def _take_wireguard_key(tx: Transaction, row: NodeRow, public_key: bytes) -> None:
    if row.wireguard_public_key == public_key:
        return
    other = await tx.session.scalar(
        sa.select(NodeRow.name).where(NodeRow.wireguard_public_key == public_key, NodeRow.id != row.id)
    )
    if other is not None:
        log.error("fleet.wireguard_key_taken", node=row.name, other=other)
        raise WireGuardKeyTaken
    row.wireguard_public_key = public_key
    tx.touch(Topic.NODES)


def _check_wireguard_key(raw: bytes) -> None:
    try:
        PublicKey(raw)
    except InvalidKey as error:
        raise WireGuardKeyInvalid from error
