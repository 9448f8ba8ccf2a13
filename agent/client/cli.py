"""The command line: what can be typed, and which function does it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeAlias

from agent.client.profile import Profile
from agent.config import parse_protocols, split_address
from agent.drivers.wireguard import Backend
from shared import __version__
from shared.resource import Protocol

Command: TypeAlias = Callable[[argparse.Namespace, Profile], Coroutine[Any, Any, int]]

_EPILOG = """\
exit status: 0 done, 1 failed, 2 wrong usage, 3 not logged in (skynetvpn login), 130 interrupted.
files: the session and the WireGuard keys are in $XDG_CONFIG_HOME/skynetvpn (~/.config/skynetvpn), the tunnels
that are up in $XDG_STATE_HOME/skynetvpn (~/.local/state/skynetvpn). Run all commands as the same user."""

_PROTOCOLS = tuple(map(str, Protocol))
_CONNECT = """\
Opens a connection, brings the tunnel up and waits until both ends confirm it. Needs root, but for ssh. Without SERVER
the online server with the least load is taken.

wireguard: makes a key once for each server, and sends only its public half. openvpn, l2tp: by the programs of that
name, which must be installed. ssh: a SOCKS proxy on this machine (--proxy) instead of an interface; with --tun, or
where the server forwards nothing else, an interface by root, for all of IPv4.

Names are resolved through the tunnel where systemd-resolved or resolvconf manages them; with --netns by
/etc/netns/NS/resolv.conf, unless that file is there already. With --no-routes nothing but the interface is set."""

_UP = """\
Runs a controller and one node on this machine in the foreground, ready to use; Ctrl-C ends both, while the tunnels
and servers of the node go on. The first start makes an administrator and prints the password once; later ones with the
same --dir go on with what is there. Needs root."""


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="skynetvpn",
        description="Use a SkynetVPN from this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=__version__)
    _output(root, default="text")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=description or f"{help[0].upper()}{help[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _output(command, default=argparse.SUPPRESS)  # what was said before the command's name holds
        return command

    _login(add("login", "start a session; asks for the password without showing it"))
    add("logout", "take this machine's tunnels down and end the session, here and on the controller")
    add("servers", "list the servers that the account may use")
    _connect(add("connect", "bring a tunnel up and wait until it is connected", _CONNECT))
    status = add("status", "show the account's live connections and this machine's tunnels")
    status.add_argument("-w", "--watch", action="store_true", help="again every two seconds until Ctrl-C")
    _config(add("config", "print a connection's configuration, for any program of its protocol"))
    disconnect = add("disconnect", "take tunnels down and end their connections")
    disconnect.add_argument(
        "id", nargs="?", metavar="ID", help="connection id, interface or server (default: all tunnels of this machine)"
    )
    _up(add("up", "run a controller and one node on this machine", _UP))
    return root


def function_of(command: str) -> Command:
    """Imports what the command needs, and that only: --help and a wrong argument are answered at once."""
    match command:
        case "login" | "logout":
            from agent.client import account

            return account.login if command == "login" else account.logout
        case "connect" | "disconnect":
            from agent.client import connect

            return connect.connect if command == "connect" else connect.disconnect
        case "up":
            from agent.client import up

            return up.up
        case _:
            from agent.client import show

            return {"servers": show.servers, "status": show.status, "config": show.config}[command]


def _output(command: argparse.ArgumentParser, *, default: str) -> None:
    command.add_argument(
        "-o",
        "--output",
        choices=("text", "json"),
        default=default,
        help="json: one JSON value on stdout, for scripts; progress and errors are on stderr either way",
    )


def _login(command: argparse.ArgumentParser) -> None:
    command.add_argument("user", nargs="?", metavar="USER", help="user name or e-mail address")
    command.add_argument("--url", help="the controller (default: $SKYNETVPN_URL, the last one, http://127.0.0.1:8080)")
    command.add_argument("--password-stdin", action="store_true", help="read the password from the first line of stdin")
    command.add_argument("--ca", type=Path, metavar="FILE", help="trust this CA (PEM) instead of the system's")
    command.add_argument("--allow-http", action="store_true", help="send the password in clear text to another machine")


def _connect(command: argparse.ArgumentParser) -> None:
    server = command.add_mutually_exclusive_group()
    server.add_argument("server", nargs="?", metavar="SERVER", help="name or id (default: the least loaded)")
    server.add_argument("--server", dest="server_option", metavar="NAME_OR_ID", help="the same as an option")
    command.add_argument(
        "--protocol", choices=_PROTOCOLS, default=Protocol.WIREGUARD, metavar="{" + ",".join(_PROTOCOLS) + "}"
    )
    command.add_argument("--key-file", type=Path, metavar="F", help="WireGuard key to use, made there if it is missing")
    command.add_argument(
        "--proxy", type=_proxy, default="127.0.0.1:1080", metavar="H:P", help="of ssh (default: %(default)s)"
    )
    command.add_argument("--tun", action="store_true", help="of ssh: an interface instead of the proxy; needs root")
    command.add_argument("--netns", metavar="NS", help="put the tunnel into this network namespace (ip netns)")
    command.add_argument("--interface", metavar="NAME", help="interface to create (default: the next free skyvpnN)")
    command.add_argument(
        "--backend",
        type=Backend,
        choices=list(Backend),
        default=Backend.AUTO,
        metavar="{" + ",".join(Backend) + "}",
        help="the kernel's WireGuard or wireguard-go (default: the kernel's if it has it)",
    )
    command.add_argument("--no-routes", action="store_true", help="change no route and no name resolution")
    command.add_argument("--timeout", type=_seconds, default=30, metavar="S", help="seconds to wait (default: 30)")


def _config(command: argparse.ArgumentParser) -> None:
    command.add_argument("id", nargs="?", metavar="ID", help="connection id (default: the only one)")
    command.add_argument(
        "--new",
        action="store_true",
        help="for another device: open a connection whose key the controller makes; ID then names the server",
    )
    command.add_argument("--protocol", choices=_PROTOCOLS, default=Protocol.WIREGUARD, help="of the --new one")
    command.add_argument("--format", choices=("conf", "json", "svg", "png"), help="default: conf; svg and png: QR code")
    command.add_argument("--file", type=Path, metavar="F", help="write it there (mode 0600) instead of to stdout")
    command.add_argument(
        "--with-key", action="store_true", help="conf: put in the private key that connect made on this machine"
    )


def _up(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dir", type=Path, metavar="D", help="where everything is kept (default: under the state files)"
    )
    command.add_argument("--listen", metavar="H:P", help="API (default: 127.0.0.1:8080)")
    command.add_argument("--node-listen", metavar="H:P", help="node channel (default: 127.0.0.1:8443)")
    command.add_argument(
        "--endpoint", metavar="HOST", help="address that clients dial (default: this machine's on its default route)"
    )
    command.add_argument(
        "--protocols",
        type=_protocols,
        metavar="P,P",
        help="what the node serves from now on (default: as it is, at the first start wireguard)",
    )
    command.add_argument("--country", default="DE", metavar="CC", help="shown for the node (default: %(default)s)")
    command.add_argument("--city", default="Local", help="shown for the node (default: %(default)s)")


def _proxy(text: str) -> str:
    try:
        split_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _protocols(text: str) -> tuple[Protocol, ...]:
    try:
        return parse_protocols(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 3600")
    return value
