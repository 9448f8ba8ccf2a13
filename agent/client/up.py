"""A controller and one node on this machine, as children of this process: all of them run, or none."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import yaml

from agent import config, files
from agent.client import serving
from agent.client.api import Api
from agent.client.errors import Failure, Misuse
from agent.client.output import Progress, fields, json_text
from agent.client.profile import Profile
from agent.drivers import commands
from agent.errors import AgentError
from shared.resource import Protocol

_LISTEN, _NODE_LISTEN = "127.0.0.1:8080", "127.0.0.1:8443"
_ADMIN = "admin"
_NODE = "local"
_INTERFACE = "sky0"
_START_SECONDS = 30.0
_SETTLE_SECONDS = 20.0
_STEADY_SECONDS = 4.0  # that a failure lasts before it is told: a server may wait for its certificate at first
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.1
_LAST_WORDS = 15  # lines
_TAKE_DOWN = 'To take them down: docs/operations.md, "Taking a host out of service"'
_METRICS_TIMEOUT = aiohttp.ClientTimeout(total=5)

T = TypeVar("T")


async def up(arguments: argparse.Namespace, profile: Profile) -> int:
    if os.geteuid() != 0:
        raise Failure("up needs root: its node makes a WireGuard interface and sets forwarding and NAT")
    directory: Path = (arguments.dir or profile.state / "up").absolute()
    files.make_private_directory(directory)
    installation = Installation(directory, arguments)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        with _alone(directory):
            await installation.run()
    except asyncio.CancelledError:
        if not installation.announced:
            raise KeyboardInterrupt from None
        print(
            f"stopped; tunnels and servers of the node go on, and the next start takes them over. {_TAKE_DOWN}",
            file=sys.stderr,
        )
        return 0
    return 1


class Child:
    """A program of the installation; it must run for as long as the installation does."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, offset: int) -> None:
        self.name, self.log = name, log
        self._process, self._offset = process, offset

    @classmethod
    async def start(cls, name: str, argv: list[str], log: Path) -> Child:
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            offset = output.tell()
            return cls(name, await commands.start(argv, output=output.fileno()), log, offset)

    async def ended(self) -> Failure:
        status = await self._process.wait()
        with self.log.open("rb") as file:
            file.seek(self._offset)
            words = file.read().decode(errors="replace").splitlines()[-_LAST_WORDS:]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Failure("\n  ".join([f"the {self.name} ended with {how}; its last words ({self.log}):", *words]))

    async def stop(self) -> None:
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            print(f"skynetvpn: the {self.name} did not end in {_STOP_SECONDS:g} s and is killed", file=sys.stderr)
            self._process.kill()
            await self._process.wait()


class Installation:
    """What `up` keeps in its directory: the controller's, the agent's, their logs, and whether there is an admin."""

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        self.announced = False
        self._directory = directory
        self._arguments = arguments
        self._settings = directory / "controller" / "controller.yaml"
        self._agent = directory / "agent"
        self._agent_settings = self._agent / "agent.yaml"
        self._admin = directory / "admin"
        self._progress = Progress()
        self._password: str | None = None  # of the administrator, where this start made it; nothing keeps it

    async def run(self) -> None:
        """Returns never: raises Failure when a child ends, CancelledError when the person has enough."""
        try:
            async with AsyncExitStack() as stack:
                await self._run(stack)
        finally:
            self._progress.done()
            if self._password is not None and not self.announced:  # no later start can tell it
                print(f"the administrator is made: {_ADMIN}, password {self._password}", file=sys.stderr)

    async def _run(self, stack: AsyncExitStack) -> None:
        if not self._settings.exists():
            await self._initialise()
        url = self._url()
        self._progress.show("starting the controller")
        argv = [_script("skynetvpn-controller"), "run", "--config", str(self._settings)]
        controller = await Child.start("controller", argv, self._directory / "controller.log")
        stack.push_async_callback(controller.stop)
        async with Api(url) as api:
            await _until(api.ready, f"the controller does not answer at {url}", controller)
            await self._make_admin()
            await self._enrol(controller)
            self._progress.show("starting the node's agent")
            argv = [_script("skynetvpn-agent"), "run", "--config", str(self._agent_settings)]
            agent = await Child.start("agent", argv, self._directory / "agent.log")
            stack.push_async_callback(agent.stop)
            await _until(self._online, "the node does not come online", controller, agent)
            servers = await self._settle(controller, agent)
        self._progress.done()
        self._announce(url, servers)
        await _unless_ended(asyncio.Event().wait(), controller, agent)

    async def _initialise(self) -> None:
        self._progress.show("making the controller's directory")
        listen, node_listen = self._arguments.listen or _LISTEN, self._arguments.node_listen or _NODE_LISTEN
        _check_free(listen, "--listen")
        _check_free(node_listen, "--node-listen")
        _check_no_other()
        directory = str(self._settings.parent)
        await self._controller("init", "--dir", directory, "--listen", listen, "--node-listen", node_listen)

    def _url(self) -> str:
        """Where the API is from here; the directory's settings hold after the first start."""
        settings = yaml.safe_load(self._settings.read_text())
        for name, wanted in (("listen", self._arguments.listen), ("node_listen", self._arguments.node_listen)):
            if wanted and wanted != settings.get(name, wanted):
                raise Misuse(f"{self._settings} says {name}: {settings[name]}; change it there, or use another --dir")
        host, port = config.split_address(settings["listen"])
        if host != "localhost" and ip_address(host).is_unspecified:
            host = "127.0.0.1"
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _make_admin(self) -> None:
        if self._admin.exists():
            return
        self._progress.show("making the administrator")
        password = secrets.token_urlsafe(15)
        options = ["--email", f"{_ADMIN}@example.org", "--role", "admin", "--plan", "enterprise", "--password-stdin"]
        await self._controller("user", "add", _ADMIN, *options, stdin=f"{password}\n")
        self._password = password
        files.write_private(self._admin, f"{_ADMIN}\n".encode())

    async def _enrol(self, controller: Child) -> None:
        if self._agent_settings.exists():
            self._choose_protocols()
            return
        self._progress.show("enrolling this machine as a node")
        endpoint = self._arguments.endpoint or _own_address()
        options = ["--country", self._arguments.country, "--city", self._arguments.city, "--endpoint", endpoint]
        token = await self._controller("node", "token", "--name", _NODE, *options)
        argv = [_script("skynetvpn-agent"), "enroll", "--token", "-", "--dir", str(self._agent)]
        argv += ["--protocols", ",".join(self._arguments.protocols)] if self._arguments.protocols else []
        await _unless_ended(commands.run(argv, stdin=token, timeout=60), controller)

    def _choose_protocols(self) -> None:
        """The agent stops those that it finds no more in its settings."""
        known, wanted = config.load(self._agent_settings, {}), self._arguments.protocols
        if wanted and set(wanted) != set(known.protocols):
            text = config.render(
                self._agent_settings, directory=known.directory, controller=known.controller, protocols=wanted
            )
            files.write_private(self._agent_settings, text)

    async def _controller(self, *argv: str, stdin: str | None = None) -> str:
        settings = [] if argv[0] == "init" else ["--config", str(self._settings)]
        return await commands.run([_script("skynetvpn-controller"), *argv, *settings], stdin=stdin, timeout=60)

    async def _online(self) -> bool:
        """Where the agent's metrics are turned off nothing can be asked."""
        metrics = await self._metrics()
        return metrics is None or serving.online(metrics)

    async def _settle(self, *children: Child) -> Mapping[str, serving.Server]:
        """What came of each protocol; one that takes longer than anybody would wait is told as such."""
        protocols = config.load(self._agent_settings).protocols
        self._progress.show(f"starting {', '.join(protocols)}")
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                return await _unless_ended(self._settled(protocols), *children)
        except TimeoutError:
            return await self._servers(protocols)

    async def _settled(self, protocols: Sequence[Protocol]) -> Mapping[str, serving.Server]:
        """When all of them run, or what fails has done so for a while."""
        servers: Mapping[str, serving.Server] = {}
        since = time.monotonic()
        while True:
            metrics, former = await self._metrics(), servers
            if metrics is None or serving.tried(metrics, protocols):
                found = await self._servers(protocols)
                servers = found if serving.agree(metrics or "", found) else {}
            if servers != former:
                since = time.monotonic()
            if servers and (serving.whole(servers) or time.monotonic() - since > _STEADY_SECONDS):
                return servers
            await asyncio.sleep(_POLL_SECONDS)

    async def _servers(self, protocols: Sequence[Protocol]) -> Mapping[str, serving.Server]:
        return serving.servers_of(await self._controller("node", "status", _NODE, "--output", "json"), protocols)

    async def _metrics(self) -> str | None:
        """Of the agent; None where they are turned off, nothing where it does not answer yet."""
        address = config.load(self._agent_settings).metrics
        if not address:
            return None
        try:
            async with aiohttp.request("GET", f"http://{address}/metrics", timeout=_METRICS_TIMEOUT) as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return ""

    def _announce(self, url: str, servers: Mapping[str, serving.Server]) -> None:
        self.announced = True
        if self._arguments.output == "json":
            told = {"url": url, "user": _ADMIN, "password": self._password, "protocols": servers}
            print(json_text(told), flush=True)
            return
        pairs = [("API", f"{url}  (documentation: {url}/docs)"), ("user", _ADMIN)]
        client, controller = _script("skynetvpn"), _script("skynetvpn-controller")
        another = f"{controller} user set {_ADMIN} --password-stdin --config {self._settings}"
        pairs.append(("password", self._password or f"as it was printed once; for another one: {another}"))
        pairs.append(("files, logs", str(self._directory)))
        pairs += [(protocol, server.words) for protocol, server in servers.items()]
        again = f"{controller} node status {_NODE} --config {self._settings}"
        but = (
            ""
            if serving.whole(servers)
            else f"\nNot all of it: the agent tries again by itself; {again} says how far it is."
        )
        print(
            f"""
SkynetVPN runs on this machine. Ctrl-C ends the controller and the agent; tunnels and servers go on.
{_TAKE_DOWN}{but}

{fields(pairs)}

In another terminal, as root:
  {client} login --url {url} {_ADMIN}
  {client} servers
{_trial(client, serving.to_itself(servers))}
More users:
  {controller} user add NAME --email E --role user --password-stdin --config {self._settings}
""",
            flush=True,
        )


def _trial(client: str, protocol: Protocol | None) -> str:
    """What to type to use the node; nothing where it serves nothing that this machine can use."""
    if protocol is None:
        return ""
    choice = "" if protocol is Protocol.WIREGUARD else f" --protocol {protocol}"
    lines = f"""\
  {client} connect --no-routes{choice}     # this machine to itself: a real handshake; routes stay as they are
  {client} status
  {client} disconnect
"""
    if protocol is not Protocol.WIREGUARD:
        return lines
    return f"""\
{lines}
Another device that reaches UDP port 51820 of this machine scans this code:
  {client} config --new --format svg --file phone.svg
"""


def _script(name: str) -> str:
    """A console script of the environment that this one runs in."""
    return str(Path(sys.executable).with_name(name))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(directory))
        except AgentError as error:
            raise Failure(f"{directory} is in use by another skynetvpn up") from error
        yield


def _check_free(address: str, option: str) -> None:
    """Raise Misuse before anything is made that would have the address in its settings."""
    try:
        host, port = config.split_address(address)
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except ValueError as error:
        raise Misuse(f"{option}: {error}") from error
    except OSError as error:
        raise Failure(f"cannot listen on {address}: {error.strerror}; choose another address with {option}") from error


def _check_no_other() -> None:
    """A new node would take over the interface of another installation, with other keys and other peers."""
    if _INTERFACE in {name for _, name in socket.if_nameindex()}:
        raise Failure(
            f"this machine has an interface {_INTERFACE} already, of another installation: go on with the --dir of "
            f"that one, or take it down first. {_TAKE_DOWN}"
        )


def _own_address() -> str:
    """The address of this machine on its default route: asks the routing table, sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


async def _until(condition: Callable[[], Awaitable[bool]], otherwise: str, *children: Child) -> None:
    async def poll() -> None:
        while not await condition():  # noqa: ASYNC110  # another program's state, nothing here is told of it
            await asyncio.sleep(_POLL_SECONDS)

    try:
        async with asyncio.timeout(_START_SECONDS):
            await _unless_ended(poll(), *children)
    except TimeoutError as error:
        raise Failure(f"{otherwise} within {_START_SECONDS:g} s; its log: {children[-1].log}") from error


async def _unless_ended(work: Coroutine[Any, Any, T], *children: Child) -> T:
    """Do the work; raise Failure with a child's last words when one ends before."""
    task = asyncio.create_task(work)
    watches = [asyncio.create_task(child.ended()) for child in children]
    try:
        await asyncio.wait([task, *watches], return_when=asyncio.FIRST_COMPLETED)
        for watch in watches:
            if watch.done():
                raise watch.result()
        return await task
    finally:
        for started in (task, *watches):
            started.cancel()
        await asyncio.gather(task, *watches, return_exceptions=True)
