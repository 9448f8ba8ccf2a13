"""L2TP over IPsec by an IKE daemon, an xl2tpd and a pppd that belong to one connection, with files of its own."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path

import msgspec

from agent import files
from agent.client import namespace, programs, resolver
from agent.client.api import Api
from agent.client.errors import Failure
from agent.client.profile import LocalTunnel
from agent.client.tunnel import Counters, ping
from agent.drivers import commands
from agent.drivers.base import DriverError, Unsupported
from agent.drivers.l2tp import charon, privately, vici, xl2tpd
from agent.drivers.l2tp.charon import Charon
from agent.drivers.l2tp.files import ETC_PPP, chap_secrets, refusal, shared_key
from agent.drivers.l2tp.processes import Daemon, Process, end, started
from shared.access import USERNAME, check_chap_secret
from shared.resource import InvalidResource
from shared.services import L2TP_PORT

_IKE_SECONDS, _LOGIN_SECONDS, _POLL_SECONDS = 20.0, 25.0, 0.1
_END_WITHIN = 3.0
_RUN = Path("/run")  # the path of a socket is short, that of a home may be long
_MTU = 1400
# Another one for each connection (RFC 2661 §8.1): a server still has the socket of one that broke off, and its kernel
# would give it the packets of the next one from the same port.
_OWN_PORTS = range(49152, 65536)
_HALVES = ("0.0.0.0/1", "128.0.0.0/1")  # before any default route, and gone with the interface
_LAST_WORDS = 3
_ADDRESS = re.compile(r"local +IP address (\S+)")  # pppd's log
_NAME_SERVER = re.compile(r"^nameserver ([0-9.]+)$", re.MULTILINE)
_REFUSED = "authentication failed"
_PACKAGES = {charon.PROGRAM: "charon-systemd", xl2tpd.PROGRAM: "xl2tpd", xl2tpd.PPPD: "ppp"}


class L2tpMaterial(msgspec.Struct, frozen=True):
    """The `json` format of the config of an L2TP connection."""

    host: str
    psk: str
    username: str
    password: str

    def __repr__(self) -> str:
        return f"L2tpMaterial(host={self.host!r}, username={self.username!r})"


async def up(local: LocalTunnel, api: Api, *, routes: bool, save: Callable[[LocalTunnel], None]) -> LocalTunnel:
    """The pre-shared key goes to charon by its socket, the password to pppd by a file."""
    _check_host()
    material = await _material(local, api)
    server = await _resolve(material.host)
    local = msgspec.structs.replace(local, endpoint=str(server))
    save(local)
    ike = _Ike(_ike_directory(local))
    port = secrets.choice(_OWN_PORTS)
    await asyncio.to_thread(_write, local, material, server, port)
    await namespace.within(local.netns, ike.start)
    if not await ike.secure(material.psk, server, port):
        raise Failure(
            f"{local.server} sets up no IPsec at {server}: does a firewall on the way block UDP 500 and 4500?"
        )
    await namespace.within(local.netns, lambda: _dial(local))
    local = msgspec.structs.replace(local, addresses=(f"{await _wait(local)}/32",))
    save(local)
    if routes:
        await namespace.within(local.netns, lambda: _route(local))
        if servers := _name_servers(local):
            used = await resolver.use(servers, local.interface, local.netns)
            local = msgspec.structs.replace(local, resolver=used)
    save(local)
    return local


async def down(local: LocalTunnel) -> None:
    await resolver.restore(local.resolver, local.interface, local.netns)
    for found in (_daemon(local).find(), *_processes(local)):  # xl2tpd first: it says farewell, and ends its pppd
        if found is not None:
            await end([found], _END_WITHIN)
    await _Ike(_ike_directory(local)).stop()
    if local.netns is None or namespace.exists(local.netns):
        await namespace.within(local.netns, lambda: _unroute(local))
    for directory in (_directory(local), _ike_directory(local)):
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    programs.forget(local)


async def counters(local: LocalTunnel) -> Counters | None:
    process = _daemon(local).find()
    if process is None:
        return None
    moved = await asyncio.to_thread(programs.traffic, process.pid, local.interface)
    return Counters(*moved, programs.since(process.pid)) if moved is not None else None


async def latency(local: LocalTunnel) -> float | None:
    return await ping(local.endpoint, local.netns) if local.endpoint else None


class _Ike(Charon):
    """The same daemon as a server's, as the end that dials."""

    async def start(self) -> None:
        try:
            await self._start()
        except DriverError as error:
            ports = " and ".join(map(str, charon.PORTS))
            raise Failure(f"no IKE daemon starts: is another one here, at UDP {ports}? ({error})") from error

    async def secure(self, psk: str, server: IPv4Address, port: int) -> bool:
        """Have a security association; False where the server does not agree to one."""
        await self._call("load-shared", shared_key(psk))
        await self._call("load-conn", _association(server, port))
        request = vici.request("initiate", {"child": "l2tp", "timeout": str(round(_IKE_SECONDS * 1000))})
        try:
            async with asyncio.timeout(_IKE_SECONDS + 5):
                answer = await self._exchange(request)
        except TimeoutError:
            return False
        except (OSError, EOFError, vici.MalformedPacket) as error:
            raise DriverError(f"charon ended while it dialled: {error}") from error
        return answer.get("success") == "yes"


def _association(server: IPv4Address, port: int) -> dict[str, object]:
    """The `load-conn` request of vici. By the trap no packet for the server ever leaves unencrypted."""
    return {
        "l2tp": {
            "version": "1",
            "proposals": ["aes256-sha256-ecp256", "aes256-sha256-modp2048"],
            "remote_addrs": [str(server)],
            "dpd_delay": "30s",
            "dpd_timeout": "120s",
            "local": {"auth": "psk"},
            "remote": {"auth": "psk"},
            "children": {
                "l2tp": {
                    "mode": "transport",
                    # UDP by its number: where netbase is not installed no file knows the name.
                    "local_ts": [f"dynamic[17/{port}]"],
                    "remote_ts": [f"dynamic[17/{L2TP_PORT}]"],
                    "esp_proposals": ["aes256gcm16", "aes256-sha256"],
                    "start_action": "trap",
                }
            },
        }
    }


def _check_host() -> None:
    for program, package in _PACKAGES.items():
        if not Path(program).exists():
            raise Unsupported(f"{program} is not installed on this host: install the Debian package {package}")


async def _material(local: LocalTunnel, api: Api) -> L2tpMaterial:
    """Raise Failure for what no controller should send: all of it becomes lines of files."""
    try:
        material = msgspec.json.decode(await api.config(local.connection_id, "json"), type=L2tpMaterial)
        if not USERNAME.fullmatch(material.username):
            raise InvalidResource(f"{material.username!r} is no login")
        if not all(map(check_chap_secret, (material.psk, material.password))) or refusal(material.password) is not None:
            raise InvalidResource("a secret has other characters than these have")
    except (msgspec.MsgspecError, ValueError) as error:
        raise Failure(f"the controller sent a configuration that cannot be used: {error}") from error
    return material


async def _resolve(host: str) -> IPv4Address:
    """Where the command was typed, for a new namespace has no name servers yet."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise Failure(f"the server's name {host} has no IPv4 address: {error.strerror}") from error
    return IPv4Address(found[0][4][0])


def _write(local: LocalTunnel, material: L2tpMaterial, server: IPv4Address, port: int) -> None:
    directory = _directory(local)
    for made in (directory.parent, directory, _ike_directory(local)):
        files.make_private_directory(made)
    name = directory.name
    lines = {
        f"{name}.conf": (
            f"[global]\nport = {port}\nauth file = /dev/null\n"
            f"[lac vpn]\nlns = {server}\nautodial = yes\npppoptfile = {ETC_PPP}/{name}.options\n"
        ),
        f"{name}.options": "".join(f"{line}\n" for line in _options(local, material.username)),
        "chap-secrets": chap_secrets({material.username: material.password}),
        "log": "",  # pppd writes to these two, and leaves their modes as they are
        "resolv.conf": "",
    }
    for name, text in lines.items():
        files.write_private(directory / name, text.encode())


def _options(local: LocalTunnel, username: str) -> list[str]:
    """pppd(8). It takes addresses as the server gives them; routes are ours."""
    return [
        f'name "{username}"',
        "remotename skynetvpn",  # as chap-secrets calls the server
        "noauth",
        "refuse-pap",
        "refuse-eap",
        f"ifname {local.interface}",
        f"mtu {_MTU}",
        f"mru {_MTU}",
        "noipdefault",
        "ipcp-accept-local",
        "ipcp-accept-remote",
        "usepeerdns",
        "nodefaultroute",
        "noipv6",
        "noccp",
        "novj",
        "hide-password",
        "lcp-echo-interval 20",
        "lcp-echo-failure 3",
        f"logfile {ETC_PPP}/log",
    ]


async def _dial(local: LocalTunnel) -> None:
    """xl2tpd and pppd see our directory as their /etc/ppp."""
    directory = _directory(local)
    inside = [sys.executable, "-I", str(privately.__file__), str(directory), str(ETC_PPP)]
    of_own = ["-c", f"{ETC_PPP}/{directory.name}.conf", "-p", f"{ETC_PPP}/xl2tpd.pid", "-C", f"{ETC_PPP}/control"]
    await _daemon(local).start(directory.name, "xl2tpd", [*inside, xl2tpd.PROGRAM, *of_own])


async def _wait(local: LocalTunnel) -> str:
    """Our address inside; raise Failure with pppd's words where it gets none."""
    deadline = time.monotonic() + _LOGIN_SECONDS
    while (found := _ADDRESS.search(text := _read(local, "log"))) is None:
        words = " | ".join(text.splitlines()[-_LAST_WORDS:]) or "no message"
        if _REFUSED in text:
            raise Failure(f"{local.server} refuses the login: {words}")
        if _daemon(local).find() is None or time.monotonic() > deadline:
            raise Failure(f"{local.server} did not let us in within {_LOGIN_SECONDS:g} s: {words}")
        await asyncio.sleep(_POLL_SECONDS)
    return found[1]


async def _route(local: LocalTunnel) -> None:
    """All but the way to the server itself, which stays as it is."""
    way = json.loads(await commands.run(["ip", "-j", "-4", "route", "get", local.endpoint]))[0]
    if not json.loads(await commands.run(["ip", "-j", "-4", "route", "show", f"{local.endpoint}/32"])):
        route = [f"{local.endpoint}/32", *(["via", way["gateway"]] if "gateway" in way else []), "dev", way["dev"]]
        files.write_private(_directory(local) / "route", json.dumps(route).encode())
        await commands.run(["ip", "-4", "route", "add", *route])
    for half in _HALVES:
        await commands.run(["ip", "-4", "route", "add", half, "dev", local.interface])


async def _unroute(local: LocalTunnel) -> None:
    if text := _read(local, "route"):
        try:
            await commands.run(["ip", "-4", "route", "delete", *json.loads(text)])
        except DriverError:  # it went with its interface
            return


def _name_servers(local: LocalTunnel) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NAME_SERVER.findall(_read(local, "resolv.conf"))))


def _read(local: LocalTunnel, name: str) -> str:
    path = _directory(local) / name
    return path.read_text(errors="replace") if path.exists() else ""


def _directory(local: LocalTunnel) -> Path:
    return programs.file_of(local, ".l2tp")


def _ike_directory(local: LocalTunnel) -> Path:
    return _RUN / f"skynetvpn-{Path(local.key_file).name}"


def _daemon(local: LocalTunnel) -> Daemon:
    return Daemon(_directory(local) / "xl2tpd.pid")


def _processes(local: LocalTunnel) -> list[Process]:
    """What was started with the files of this connection: xl2tpd, its pppd."""
    mark = f"{ETC_PPP}/{_directory(local).name}.".encode()
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark in (directory / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        since = started(pid := int(directory.name))
        if ours and since is not None:
            found.append(Process(pid, since))
    return found
