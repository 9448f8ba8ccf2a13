"""Bodies of the contract `irssh`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from controller.contracts.kit import GivenMoment, Id, Model, Moment, Secret, Text

ProtocolName = Literal["wireguard", "openvpn", "ssh", "l2tp"]
ProtocolStatus = Literal["running", "applying", "error", "stopped"]
PeriodName = Literal["none", "daily", "weekly", "monthly"]
Protocols = Annotated[list[ProtocolName], Field(max_length=4, description="What the account may use")]
Amount = Annotated[int, Field(ge=1, le=2**63 - 1)]


class Credentials(Model):
    username: Annotated[Text, Field(description="A user name or an e-mail address")]
    password: Secret


class Token(Model):
    access_token: str
    token_type: Literal["bearer"]


class UserSummary(Model):
    id: int
    username: str
    email: str
    active: bool
    created_at: Moment


class Users(Model):
    users: list[UserSummary]


class NewUser(Model):
    username: Annotated[Text, Field(description="1 to 31 of a-z 0-9 _ -, also the login of each protocol")]
    email: Text
    password: Secret
    protocols: Protocols


class CreatedUser(UserSummary):
    protocols: list[ProtocolName]


class UserDetails(CreatedUser):
    quota_bytes: Annotated[int | None, Field(description="null = no quota")]
    quota_period: PeriodName
    used_bytes: Annotated[int, Field(description="Of the quota, in the present period")]
    expires_at: Moment | None
    max_sessions: Annotated[int | None, Field(description="At the same time, over all servers and protocols")]
    rate_up: Annotated[int | None, Field(description="Bits per second from the client")]
    rate_down: Annotated[int | None, Field(description="Bits per second to the client")]


class UserChange(Model):
    """What is not given stays as it is; null takes a limit away."""

    email: Text | None = None
    password: Annotated[Secret | None, Field(description="Ends the account's logins; new for every protocol")] = None
    active: bool | None = None
    protocols: Protocols | None = None
    quota_bytes: Amount | None = None
    quota_period: PeriodName | None = None
    expires_at: GivenMoment | None = None
    max_sessions: Amount | None = None
    rate_up: Annotated[Amount | None, Field(description="Bits per second from the client")] = None
    rate_down: Annotated[Amount | None, Field(description="Bits per second to the client")] = None


class Done(Model):
    detail: str


class Kicked(Model):
    kicked: Annotated[int, Field(description="Sessions that end now")]


class ProtocolState(Model):
    name: ProtocolName
    status: ProtocolStatus
    port: int
    active_users: int


class ProtocolList(Model):
    protocols: list[ProtocolState]


class ProtocolChange(Model):
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    settings: Annotated[
        dict[str, Any] | None, Field(max_length=50, description="What is not given stays as it is; null = the default")
    ] = None


class ConfiguredProtocol(ProtocolState):
    settings: dict[str, Any]


class OneServer(Model):
    server_id: Annotated[Id | None, Field(description="Only this server instead of the whole fleet")] = None


class NetworkStats(Model):
    in_: Annotated[float, Field(alias="in", description="Bytes per second")]
    out: Annotated[float, Field(description="Bytes per second")]


class SystemMetrics(Model):
    cpu_usage: Annotated[float, Field(ge=0, le=100)]
    memory_usage: Annotated[float, Field(ge=0, le=100)]
    disk_usage: Annotated[float, Field(ge=0, le=100)]
    network_stats: NetworkStats


class ActiveConnection(Model):
    username: str
    protocol: ProtocolName
    connected_since: Moment
    ip_address: str


class ActiveUsers(Model):
    total_users: int
    active_users: int
    connections: list[ActiveConnection]


class Error(Model):
    detail: str
