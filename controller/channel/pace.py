"""How often one node may ask for what costs the controller a signature, a transaction or a line in the log."""

from __future__ import annotations

import math
import time
from enum import StrEnum

import structlog

from controller.errors import DomainError, ErrorKind
from controller.ratelimit import Limit, WindowStorage

CONNECTS_PER_MINUTE = 60
RENEWALS_PER_MINUTE = 10
REFUSALS_PER_MINUTE = 10
COMPLAINTS_PER_MINUTE = 10  # lines in the log
_WINDOW = 60  # seconds

log = structlog.get_logger()


class Act(StrEnum):
    CONNECT = "connects"
    RENEWAL = "renewals"
    REFUSAL = "refusals"
    COMPLAINT = "complaints"


_ALLOWED = {
    Act.CONNECT: CONNECTS_PER_MINUTE,
    Act.RENEWAL: RENEWALS_PER_MINUTE,
    Act.REFUSAL: REFUSALS_PER_MINUTE,
    Act.COMPLAINT: COMPLAINTS_PER_MINUTE,
}


class NodeTooFast(DomainError):
    kind = ErrorKind.EXHAUSTED
    code = "node_too_fast"
    message = "too many {act} of this node: {allowed} a minute are allowed; try again in a minute"


class Pace:
    """Counts per node id, across its sessions."""

    def __init__(self) -> None:
        storage = WindowStorage()
        self._limits = {act: Limit(act, allowed, _WINDOW, storage) for act, allowed in _ALLOWED.items()}
        self._exceeded: dict[tuple[str, Act], float] = {}  # when each was exceeded last

    def check(self, node_id: str, act: Act) -> None:
        """Count one; raise NodeTooFast where that is too many."""
        if not self.allows(node_id, act):
            raise NodeTooFast(act=act, allowed=_ALLOWED[act])

    def allows(self, node_id: str, act: Act) -> bool:
        """Count one, and say whether that is not too many. The log has a line when it begins."""
        if self._limits[act].hit(node_id):
            return True
        moment = time.monotonic()
        if moment - self._exceeded.get((node_id, act), -math.inf) > _WINDOW:
            log.warning("channel.node_too_fast", node_id=node_id, act=act, allowed=_ALLOWED[act])
        self._exceeded[node_id, act] = moment
        return False
