"""The frames of the node channel: one MessagePack map per WebSocket message, tagged by `t`.

Peers one version apart talk to each other: an unknown field is ignored, a frame of an unknown kind decodes to None
and is skipped, new fields have defaults. Anything else that does not fit raises MalformedFrame.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 4 * 1024 * 1024
SNAPSHOT_CHUNK = 2000  # resources per Snapshot frame
CHANNEL_PATH = "/node/v1/channel"
ENROL_PATH = "/node/v1/enrol"
CA_PATH = "/node/v1/ca"
CONTROLLER_NAME = "controller.skynetvpn.internal"  # the name in the controller's certificate, whatever its address
IDENTITY, OPENVPN_SERVER = "identity", "openvpn"  # purposes of a certificate

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Name = Annotated[str, msgspec.Meta(max_length=255)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]


class MalformedFrame(ValueError):
    """A message that is not a frame of this protocol."""


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag_field="t", omit_defaults=True):
    """Base of all frames."""


class Resource(msgspec.Struct, frozen=True, array_like=True):
    kind: Name
    key: Name
    payload: bytes


class ResourceName(msgspec.Struct, frozen=True, array_like=True):
    kind: Name
    key: Name


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """A resource that could not be applied, with the driver's own words."""

    kind: Name
    key: Name
    message: Text


class PeerStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A peer's cumulative counters, as the interface shows them. A node has thousands, none of them in a cycle."""

    public_key: bytes
    rx: Count  # bytes from the client
    tx: Count  # bytes to the client
    handshake: Count  # Unix seconds of the latest handshake, 0 = never
    endpoint: Name = ""  # host:port that the client was last seen at


class SessionStats(msgspec.Struct, frozen=True, array_like=True):
    """A session with its cumulative counters. `id` never names another session of the node."""

    id: Name
    protocol: Name
    account: Count
    username: Name
    connection: Name  # "" where the credential is the account's own
    remote: Name  # host:port of the client
    address: Name  # inside the tunnel, "" where there is none
    since: Count  # Unix seconds
    rx: Count  # bytes from the client
    tx: Count  # bytes to the client
    ended: Count = 0  # Unix seconds, 0 = it lives
    reason: Name = ""


class AccountUsage(msgspec.Struct, frozen=True, array_like=True):
    """A metered account's bytes on this node, all protocols together, since the node's ledger began."""

    account: Count
    used: Count


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """All in 0–100 but the rates; `total` is the largest of cpu, memory, bandwidth and peers."""

    total: Percent
    cpu: Percent
    memory: Percent
    bandwidth: Percent
    peers: Percent
    disk: Percent = 0.0  # of the file system that holds the agent's state
    rx_rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # bytes per second that come in from the network
    tx_rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0


# --- agent to controller ---


class Hello(Frame, frozen=True, kw_only=True, tag="hello"):
    version: int
    agent: Name  # software version
    boot_id: Name
    epoch: Name = ""  # the epoch of the stored state, "" = none
    revisions: dict[Name, Count] = {}  # scope -> stored revision
    wireguard_public_key: bytes = b""
    backend: Name = ""  # kernel | userspace
    protocols: list[Name] = []  # that this host may serve
    ssh_host_keys: list[Text] = []  # `type base64` of the tunnels' sshd
    ledger: Name = ""  # the identity of the node's records; a new one counts from 0


class Applied(Frame, frozen=True, kw_only=True, tag="applied"):
    scope: Name
    revision: Count
    digest: bytes  # of what the host has of this scope
    failures: list[Failure] = []


class Refused(Frame, frozen=True, kw_only=True, tag="refused"):
    """The node keeps what it runs: the snapshot would remove too much of it, or cannot be right."""

    scope: Name
    revision: Count
    reason: Text
    removes: Count = 0
    present: Count = 0


class Resync(Frame, frozen=True, kw_only=True, tag="resync"):
    """The node asks for a snapshot of a scope: it does not have the delta's base."""

    scope: Name
    reason: Text


class Drift(Frame, frozen=True, kw_only=True, tag="drift"):
    """What the periodic re-check found on the host and healed."""

    scope: Name
    missing: Count = 0
    unexpected: Count = 0
    changed: Count = 0


class Report(Frame, frozen=True, kw_only=True, tag="report"):
    """Load and the peers whose counters or handshake changed since the last report that was acknowledged."""

    sequence: Count
    boot_id: Name
    generation: Name  # of the interface; a new one starts its counters at 0
    peers: list[PeerStats] = []
    load: Load | None = None
    sessions: list[SessionStats] = []  # that began, moved bytes or ended since the last report that was acknowledged
    complete: bool = False  # `sessions` has every live one: any other of this node has ended
    usage: list[AccountUsage] = []  # that changed


class Renew(Frame, frozen=True, kw_only=True, tag="renew"):
    csr: Annotated[bytes, msgspec.Meta(max_length=16384)]  # PEM
    purpose: Name = IDENTITY


# --- controller to agent ---


class Welcome(Frame, frozen=True, kw_only=True, tag="welcome"):
    version: int
    epoch: Name
    node_id: Name
    scopes: list[Name]  # the union of these is the node's desired state; state of other scopes is dropped


class Delta(Frame, frozen=True, kw_only=True, tag="delta"):
    epoch: Name
    scope: Name
    base: Count
    revision: Count
    upserts: list[Resource] = []
    removals: list[ResourceName] = []


class Snapshot(Frame, frozen=True, kw_only=True, tag="snapshot"):
    """One part of a scope's whole state; the state changes when the part with `last` has come."""

    epoch: Name
    scope: Name
    revision: Count
    part: Count  # from 0
    last: bool
    resources: list[Resource] = []
    confirmed: bool = False  # the operator allows a removal beyond the blast-radius guard


class Received(Frame, frozen=True, kw_only=True, tag="received"):
    """The reports up to this sequence are stored."""

    sequence: Count


class Certificate(Frame, frozen=True, kw_only=True, tag="certificate"):
    certificate: bytes  # PEM
    ca: bytes  # PEM bundle
    purpose: Name = IDENTITY


class Bye(Frame, frozen=True, kw_only=True, tag="bye"):
    """The controller ends the session; `retry` false = this node must not come back by itself."""

    reason: Text
    retry: bool = True


FromAgent = Hello | Applied | Refused | Resync | Drift | Report | Renew
FromController = Welcome | Delta | Snapshot | Received | Certificate | Bye


# --- enrolment: MessagePack bodies of POST ENROL_PATH, over TLS that is verified against the pinned CA ---


class EnrolRequest(msgspec.Struct, frozen=True, kw_only=True):
    token_id: Name
    secret: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    csr: Annotated[bytes, msgspec.Meta(max_length=16384)]  # PEM; the controller takes only its public key
    agent: Name  # software version
    wireguard_public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]

    def __repr__(self) -> str:
        return f"EnrolRequest(token_id={self.token_id!r})"


class EnrolAnswer(msgspec.Struct, frozen=True, kw_only=True):
    node_id: Name
    name: Name
    certificate: bytes  # PEM
    ca: bytes  # PEM bundle


class EnrolRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a 4xx answer: a stable code, and words for the admin."""

    code: Name
    message: Text


class _Tag(msgspec.Struct):
    t: str


_encoder = msgspec.msgpack.Encoder()
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)
_from_controller: msgspec.msgpack.Decoder[FromController] = msgspec.msgpack.Decoder(FromController)
_tag = msgspec.msgpack.Decoder(_Tag)
_AGENT_TAGS = frozenset(frame.__struct_config__.tag for frame in get_args(FromAgent))
_CONTROLLER_TAGS = frozenset(frame.__struct_config__.tag for frame in get_args(FromController))


def encode(frame: Frame) -> bytes:
    return _encoder.encode(frame)


def decode_from_agent(data: bytes) -> FromAgent | None:
    """Return the frame, or None where a newer agent sent a kind that this version does not know."""
    try:
        return _from_agent.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if _unknown_kind(data, _AGENT_TAGS):
            return None
        raise MalformedFrame(str(error)) from error


def decode_from_controller(data: bytes) -> FromController | None:
    """Return the frame, or None where a newer controller sent a kind that this version does not know."""
    try:
        return _from_controller.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if _unknown_kind(data, _CONTROLLER_TAGS):
            return None
        raise MalformedFrame(str(error)) from error


def _unknown_kind(data: bytes, known: frozenset[Any]) -> bool:
    try:
        return _tag.decode(data).t not in known
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
