"""login and logout."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from agent.client import ending
from agent.client.api import Api
from agent.client.errors import Failure, Misuse, NotLoggedIn, Unreachable
from agent.client.output import json_text
from agent.client.profile import Profile, Session

_DEFAULT_URL = "http://127.0.0.1:8080"
_MAX_PASSWORD = 4096


async def login(arguments: argparse.Namespace, profile: Profile) -> int:
    before = profile.session()
    url = arguments.url or os.environ.get("SKYNETVPN_URL") or (before.url if before else _DEFAULT_URL)
    same = before is not None and before.url == url
    check_url(url, allow_http=arguments.allow_http)
    ca = arguments.ca.resolve() if arguments.ca else Path(before.ca) if before and same and before.ca else None
    username = arguments.user or _ask_user(before.username if before and same else "", arguments.password_stdin)
    password = _password(username, url, from_stdin=arguments.password_stdin)
    async with Api(url, ca=ca) as api:
        answer = await api.login(username, password)
    profile.save_session(Session(url, username, answer.token, answer.expires_at, str(ca) if ca else None))
    if arguments.output == "json":
        print(json_text({"url": url, "username": username, "expires_at": answer.expires_at}))
    else:
        print(f"logged in to {url} as {username} until {answer.expires_at}")
    return 0


async def logout(arguments: argparse.Namespace, profile: Profile) -> int:
    """Takes this machine's tunnels down, for nobody could look at or end them afterwards. Then it always forgets the
    token here; fails where the controller could not be told to end it."""
    session, tunnels = profile.require_session(), profile.tunnels()
    await ending.take_down(tunnels)
    try:
        async with open_api(session) as api:
            await ending.end(api, profile, tunnels)
            await api.logout()
    except NotLoggedIn:  # it had ended already
        pass
    except Unreachable as error:
        raise Failure(f"logged out here, but the session lives on until {session.expires_at}: {error}") from error
    finally:
        profile.forget_session()
    if arguments.output == "json":
        print(json_text({"url": session.url, "disconnected": [item.connection_id for item in tunnels]}))
    else:
        print("".join(f"disconnected {item.server}\n" for item in tunnels) + f"logged out of {session.url}")
    return 0


def open_api(session: Session) -> Api:
    return Api(session.url, token=session.token, ca=Path(session.ca) if session.ca else None)


def check_url(url: str, *, allow_http: bool) -> None:
    """Raise Misuse unless a password may go there."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        raise Misuse(f"{url!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or parts.fragment:
        raise Misuse(f"{url!r} is no address of a controller: write https://HOST or https://HOST:PORT")
    if parts.scheme == "http" and not allow_http and not _is_loopback(host):
        raise Misuse(f"{url} would send the password in clear text: use https, or --allow-http on a network you trust")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _ask_user(suggestion: str, from_stdin: bool) -> str:
    if from_stdin:
        raise Misuse("name the USER: stdin holds the password")
    prompt = f"User [{suggestion}]: " if suggestion else "User: "
    print(prompt, end="", file=sys.stderr, flush=True)
    username = sys.stdin.readline().strip() or suggestion
    if not username:
        raise Misuse("a user name is needed")
    return username


def _password(username: str, url: str, *, from_stdin: bool) -> str:
    if from_stdin:
        password = sys.stdin.readline(_MAX_PASSWORD).rstrip("\r\n")
    elif sys.stdin.isatty():
        password = getpass.getpass(f"Password of {username} on {url}: ")
    else:
        raise Misuse("stdin is no terminal: give the password with --password-stdin")
    if not password:
        raise Misuse("the password is empty")
    return password
