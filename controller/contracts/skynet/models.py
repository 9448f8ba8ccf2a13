"""Bodies of the contract `skynet`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from controller.contracts.kit import Id, Model, Moment, Secret, Text

ServerState = Literal["online", "offline", "maintenance"]
ConnectionState = Literal["connecting", "connected", "disconnected"]
PlanName = Literal["free", "pro", "enterprise"]


class Credentials(Model):
    username: Annotated[Text, Field(description="A user name or an e-mail address")]
    password: Secret


class Token(Model):
    token: str
    expires_at: Moment


class Message(Model):
    message: str


class ServerSummary(Model):
    id: str
    name: str
    country: str
    ip: str
    status: ServerState


class ServerDetails(ServerSummary):
    load: Annotated[float, Field(ge=0, le=100)]


class ConnectionRequest(Model):
    server_id: Id
    protocol: Literal["wireguard", "openvpn", "ssh", "l2tp"]
    public_key: Annotated[
        str | None,
        StringConstraints(pattern="^[A-Za-z0-9+/]{43}=$"),
        Field(description="WireGuard: the client's own public key, base64; without it the service makes the key pair"),
    ] = None
    device_id: Annotated[Text, StringConstraints(max_length=64)] | None = None


class ConnectionStatus(Model):
    connection_id: str
    server_id: str
    status: ConnectionState
    created_at: Moment


class ConnectionStarted(ConnectionStatus):
    status: Literal["connecting"]


class LiveConnection(ConnectionStatus):
    protocol: str
    addresses: Annotated[list[str], Field(description="Inside; OpenVPN and L2TP give one at login")]
    rx: Annotated[int, Field(description="Bytes from the client")]
    tx: Annotated[int, Field(description="Bytes to the client")]
    latest_handshake: Annotated[Moment | None, Field(description="By other protocols: the latest sign of life")]
    refusal: Annotated[
        str | None, Field(description="Where it is not connected: what keeps it out now, such as the account's quota")
    ]


class Wait(Model):
    wait: Annotated[
        Literal["applied"] | None,
        Field(description="`applied`: answer once the server has done it; the header X-Applied says whether it has"),
    ] = None


class ConfigChoice(Model):
    format: Annotated[
        Literal["conf", "json", "svg", "png"] | None, Field(description="Instead of the Accept header")
    ] = None


class ConfigFile(Model):
    addresses: list[str]
    dns: list[str]
    endpoint: str
    server_public_key: str
    allowed_ips: list[str]
    mtu: int
    keepalive: int
    preshared_key: str | None
    private_key: Annotated[str | None, Field(description="null where the client made the key")]


class OpenVpnFile(Model):
    protocol: Literal["openvpn"]
    host: str
    port: int
    transports: Annotated[list[Literal["udp", "tcp"]], Field(description="The one to try first comes first")]
    server_name: Annotated[str, Field(description="The common name of the server's certificate")]
    username: Annotated[str, Field(description="The common name of the client's")]
    ca: Annotated[str, Field(description="PEM, as the certificate and the keys")]
    certificate: str
    private_key: str
    tls_crypt_v2: str


class SshTunnel(Model):
    number: Annotated[int, Field(description="What `ssh -w any:N` asks for; the server has it for this login alone")]
    address: Annotated[str, Field(description="Of the client's end")]
    server_address: str
    dns: list[str]


class SshFile(Model):
    protocol: Literal["ssh"]
    host: str
    port: int
    username: str
    password: str
    host_keys: Annotated[list[str], Field(description="`type base64`, as in known_hosts")]
    tcp_forwarding: bool
    tun: bool
    tunnel: Annotated[
        SshTunnel | None, Field(description="Where `tun` is true, unless the network has no address left")
    ]


class L2tpFile(Model):
    protocol: Literal["l2tp"]
    host: str
    psk: str
    username: str
    password: str


class Profile(Model):
    id: str
    username: str
    email: str
    plan: PlanName
    created_at: Moment


class ProfileChange(Model):
    email: Annotated[Text | None, Field(description="It has to be verified again")] = None
    password: Annotated[Secret | None, Field(description="Ends every other login")] = None
    current_password: Annotated[Secret | None, Field(description="Needed once the login is older than 15 minutes")] = (
        None
    )


class ProfileChanged(Model):
    id: str
    username: str
    email: str
    plan: PlanName
    updated_at: Moment


class Error(Model):
    error: str
    code: int
