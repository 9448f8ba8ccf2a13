"""How far each node has come with each of its servers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from controller.desired import service as desired
from controller.fleet.nodes import NodeStatus
from controller.fleet.offer import known_protocols
from controller.fleet.servers import KINDS
from controller.fleet.tables import AppliedRow, NodeRow
from shared.resource import Protocol

_ADMITTED = [status for status in NodeStatus if status.admitted]
_OWN = sa.literal(desired.node_scope("")).concat(AppliedRow.node_id)


@dataclass(frozen=True, slots=True)
class Standing:
    node: str  # name
    applied: bool  # the node has acknowledged the server as it is now
    problem: str | None  # in the node's words

    @property
    def words(self) -> str:
        return self.problem or ("running" if self.applied else "applying")


async def read(session: AsyncSession, node_id: str | None = None) -> Mapping[Protocol, Sequence[Standing]]:
    """Of the nodes that offer each protocol and are in service, or of one node."""
    nodes = sa.select(NodeRow).where(NodeRow.enrolled_at.is_not(None), NodeRow.status.in_(_ADMITTED))
    applied = sa.select(AppliedRow.node_id, AppliedRow.revision, AppliedRow.servers).where(AppliedRow.scope == _OWN)
    if node_id is not None:
        nodes = nodes.where(NodeRow.id == node_id)
        applied = applied.where(AppliedRow.node_id == node_id)
    wanted = await desired.newest(session, KINDS.values(), desired.node_scope(node_id) if node_id is not None else None)
    reached = {row.node_id: (row.revision, servers_from(row.servers)) for row in await session.execute(applied)}
    found: dict[Protocol, list[Standing]] = {protocol: [] for protocol in Protocol}
    for node in await session.scalars(nodes.order_by(NodeRow.name)):
        revision, problems = reached.get(node.id, (-1, {}))
        for protocol in known_protocols(node.protocols.split()):
            due = wanted.get((desired.node_scope(node.id), KINDS[protocol]))
            done = due is not None and revision >= due
            found[protocol].append(Standing(node.name, done, problems.get(protocol) if done else None))
    return found


async def ailing(session: AsyncSession, node_ids: Collection[str]) -> set[tuple[str, str]]:
    """The node and the protocol of each server that does not run as it should, by what the node said last."""
    told = sa.select(AppliedRow.node_id, AppliedRow.servers).where(
        AppliedRow.node_id.in_(node_ids), AppliedRow.scope == _OWN
    )
    return {(row.node_id, name) for row in await session.execute(told) for name in servers_from(row.servers)}


def servers_from(text: str) -> dict[str, str]:
    """What ails which protocol, as AppliedRow has it."""
    return {str(protocol): str(words) for protocol, words in json.loads(text).items()}
