"""Nodes and their join tokens."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from controller.fleet.nodes import INTERFACE
from controller.store.types import Table
from shared.resource import Protocol

EVERYTHING = " ".join(Protocol)


class NodeRow(Table):
    """A VPN host. What it runs is in `desired`; what it told of itself is here."""

    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    country: Mapped[str] = mapped_column(sa.String(2))  # ISO 3166-1 alpha-2
    city: Mapped[str]
    endpoint: Mapped[str | None]  # host that clients dial; None = the address that the node connects from
    plan: Mapped[str]  # the lowest plan that may use it
    status: Mapped[str]  # NodeStatus
    created_at: Mapped[datetime]
    enrolled_at: Mapped[datetime | None]
    wireguard_public_key: Mapped[bytes | None] = mapped_column(unique=True)
    interface: Mapped[str] = mapped_column(default=INTERFACE)
    wireguard_port: Mapped[int]
    address: Mapped[str | None]  # that it last connected from
    last_seen_at: Mapped[datetime | None]
    agent: Mapped[str | None]  # software version
    serial: Mapped[str | None]  # hex, of the certificate in use
    next_serial: Mapped[str | None]  # issued, not used yet; its first use makes it `serial`
    promoted_at: Mapped[datetime | None]  # when `serial` was first used
    certificate_expires_at: Mapped[datetime | None]
    boot_id: Mapped[str | None]
    former_boot_ids: Mapped[str] = mapped_column(sa.Text)  # spaced; one that comes back betrays a cloned disk
    protocols: Mapped[str] = mapped_column(default="wireguard", server_default="wireguard")  # spaced, that it may serve
    allowed: Mapped[str] = mapped_column(default=EVERYTHING, server_default=EVERYTHING)  # spaced; it may offer no other
    ssh_host_keys: Mapped[str] = mapped_column(sa.Text, default="", server_default="")  # lines of `type base64`
    ledger: Mapped[str] = mapped_column(default="", server_default="")  # the identity of its usage records


class JoinTokenRow(Table):
    """A single-use join token; only the SHA-256 of its secret is kept."""

    __tablename__ = "join_tokens"

    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    node_id: Mapped[str] = mapped_column(sa.ForeignKey("nodes.id", ondelete="CASCADE"), index=True)
    secret_hash: Mapped[bytes]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    used_spki: Mapped[bytes | None]  # SHA-256 of the key that used it: the same key may ask again
    certificate: Mapped[bytes | None]  # PEM that was answered


class AppliedRow(Table):
    """How far a node has come with a scope, and what it said about it."""

    __tablename__ = "applied"

    node_id: Mapped[str] = mapped_column(sa.ForeignKey("nodes.id", ondelete="CASCADE"), primary_key=True)
    scope: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]
    digest: Mapped[bytes]
    applied_at: Mapped[datetime]
    problem: Mapped[str | None] = mapped_column(sa.Text)  # refusal or failures, in the node's words
    refused_revision: Mapped[int | None]  # of the snapshot that the node's blast-radius guard refused
    confirmed_at: Mapped[datetime | None]  # an operator allowed that removal; forgotten when it is applied
    servers: Mapped[str] = mapped_column(sa.Text, default="{}", server_default="{}")  # JSON: protocol -> what ails it


class ProtocolRow(Table):
    """What was set of a protocol for the whole fleet (node_id ""), or over that for one node."""

    __tablename__ = "protocols"

    protocol: Mapped[str] = mapped_column(primary_key=True)
    node_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True, default="")
    port: Mapped[int]  # 0 = not set here
    settings: Mapped[str] = mapped_column(sa.Text)  # JSON, as the API takes them; secrets are in FleetKeyRow
    updated_at: Mapped[datetime]


class FleetKeyRow(Table):
    """A key that all nodes or all clients share: the authority of VPN clients, the tls-crypt-v2 key, the IPsec PSK."""

    __tablename__ = "fleet_keys"

    name: Mapped[str] = mapped_column(primary_key=True)
    sealed_key: Mapped[bytes]
    certificate: Mapped[bytes | None]  # PEM, of an authority
    created_at: Mapped[datetime]
