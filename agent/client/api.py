"""The controller's API as a client sees it: typed answers, and errors that say what to do."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from agent.client.errors import Failure, NotLoggedIn, Refused, Unreachable

# The prefix fixes the contract; under plain /api other contracts have the same paths.
_PREFIX = "/skynet/api"
_TIMEOUT = aiohttp.ClientTimeout(total=20, connect=10)

T = TypeVar("T")


class Login(msgspec.Struct, frozen=True):
    token: str
    expires_at: str


class Server(msgspec.Struct, frozen=True):
    id: str
    name: str
    country: str
    ip: str
    status: str
    load: float | None = None  # 0 to 100; only in the details of one server


class Connection(msgspec.Struct, frozen=True):
    connection_id: str
    server_id: str
    status: str
    created_at: str
    protocol: str = "wireguard"
    addresses: tuple[str, ...] = ()
    rx: int = 0  # bytes that the server received from the client
    tx: int = 0
    latest_handshake: str | None = None
    refusal: str | None = None  # what keeps it out now; only in the list


class TunnelConfig(msgspec.Struct, frozen=True):
    """The `json` format of a connection's config; `private_key` is null where the client made the key."""

    addresses: tuple[str, ...]
    endpoint: str
    server_public_key: str
    allowed_ips: tuple[str, ...]
    dns: tuple[str, ...] = ()
    mtu: int = 1420
    keepalive: int = 0
    preshared_key: str | None = None
    private_key: str | None = None

    def __repr__(self) -> str:
        return f"TunnelConfig(addresses={self.addresses!r}, endpoint={self.endpoint!r})"


class _Problem(msgspec.Struct, frozen=True):
    error: str


class Api:
    """One controller; an async context manager. All methods raise Failure."""

    def __init__(self, url: str, *, token: str | None = None, ca: Path | None = None) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._ca = ca

    async def __aenter__(self) -> Self:
        # No connection is kept: one made before the tunnel took over the routes would hang.
        connector = aiohttp.TCPConnector(ssl=_trust(self._ca), force_close=True)
        headers = {"Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        self._http = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, headers=headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def login(self, username: str, password: str) -> Login:
        try:
            body = await self._request("POST", "/auth/login", {"username": username, "password": password})
        except NotLoggedIn as error:
            raise Refused(401, "wrong user name or password") from error
        return self._decode(body, Login)

    async def logout(self) -> None:
        await self._request("POST", "/auth/logout")

    async def servers(self) -> list[Server]:
        return self._decode(await self._request("GET", "/servers"), list[Server])

    async def server(self, id: str) -> Server:
        return self._decode(await self._request("GET", f"/servers/{quote(id, safe='')}"), Server)

    async def connections(self) -> list[Connection]:
        return self._decode(await self._request("GET", "/connections"), list[Connection])

    async def connection(self, id: str) -> Connection:
        return self._decode(await self._request("GET", _path(id)), Connection)

    async def connect(self, server_id: str, protocol: str, public_key: str | None = None) -> Connection:
        """Open a connection; without a public key the controller makes the pair, and its config has the private one."""
        wanted = {"server_id": server_id, "protocol": protocol}
        if public_key is not None:
            wanted["public_key"] = public_key
        return self._decode(await self._request("POST", "/connections", wanted), Connection)

    async def tunnel_config(self, id: str) -> TunnelConfig:
        return self._decode(await self.config(id, "json"), TunnelConfig)

    async def config(self, id: str, format: str) -> bytes:
        return await self._request("GET", f"{_path(id)}/config", query={"format": format})

    async def disconnect(self, id: str) -> None:
        await self._request("DELETE", _path(id))

    async def ready(self) -> bool:
        """Whether the controller serves; False also while it does not listen yet."""
        try:
            async with self._http.get(f"{self.url}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _request(
        self, method: str, path: str, body: object = None, *, query: Mapping[str, str] | None = None
    ) -> bytes:
        try:
            async with self._http.request(
                method, f"{self.url}{_PREFIX}{path}", json=body, params=query, allow_redirects=False
            ) as response:
                data = await response.read()
                if response.status < 300:
                    return data
                raise self._refusal(response, data)
        except aiohttp.ClientConnectorCertificateError as error:
            raise Unreachable(
                f"{self.url}: the certificate is not trusted ({error.certificate_error}); name its CA with --ca FILE"
            ) from error
        except TimeoutError as error:
            raise Unreachable(f"{self.url} did not answer within {_TIMEOUT.total:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(
                f"cannot reach {self.url} ({error}): is the controller running, and is the address right (login --url)?"
            ) from error

    def _refusal(self, response: aiohttp.ClientResponse, data: bytes) -> Failure:
        if response.status == 401:
            return NotLoggedIn(f"the session on {self.url} has ended: run skynetvpn login")
        if response.status < 400:
            target = response.headers.get("Location", "nowhere")
            return Unreachable(f"{self.url} redirects to {target}: log in there with --url")
        try:
            reason = msgspec.json.decode(data, type=_Problem).error
        except msgspec.MsgspecError:
            return Unreachable(f"{self.url} answered {response.status} and is no SkynetVPN controller, or it is broken")
        if response.status == 429 and "Retry-After" in response.headers:
            reason += f"; try again in {response.headers['Retry-After']} s"
        return Refused(response.status, reason)

    def _decode(self, data: bytes, type_: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=type_)
        except msgspec.MsgspecError as error:
            raise Unreachable(
                f"{self.url} answered something else than a SkynetVPN controller does ({error})"
            ) from error


def _path(connection_id: str) -> str:
    return f"/connections/{quote(connection_id, safe='')}"


def _trust(ca: Path | None) -> Any:
    """What aiohttp takes as `ssl`: the system's authorities, or one file instead of them."""
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise Failure(f"{ca} cannot be used as CA file: {error}") from error
