"""What the conformance suite of the ServiceDriver port needs of each driver: a host, settings, and real clients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from agent.drivers.base import Admit, Notify, ServiceDriver
from shared.access import Credential
from shared.services import Server


class ServiceClient(Protocol):
    """A real client program on another host. All methods block."""

    def connect(self) -> None:
        """Log in; return when packets can pass. Raise where that does not come about in time."""
        ...

    def refused(self) -> bool:
        """Try to log in; return True when the server has said no, and False when it is in."""
        ...

    def passes(self) -> bool:
        """Whether something sent through the tunnel comes back now."""
        ...

    def end(self) -> None:
        """Log out, or just end; one that is not in is no error."""
        ...


class Rig(Protocol):
    """One host with its driver, and another with clients. The test is on the host while it is entered."""

    asks: bool  # the driver asks `admit` before a client is in

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def driver(self, admit: Admit, notify: Notify) -> ServiceDriver:
        """A new one over the same files, as an agent that starts again makes it."""
        ...

    async def prepare(self, driver: ServiceDriver) -> None:
        """What a driver needs before its first `ensure`, such as a certificate."""
        ...

    def spec(self) -> Server: ...

    def changed_spec(self) -> Server:
        """Other settings than `spec`, on the same port."""
        ...

    def taken(self) -> AbstractContextManager[None]:
        """A context in which another program holds the port of `spec`."""
        ...

    def credential(self, username: str) -> Credential: ...

    def client(self, username: str, *, wrong: bool = False) -> ServiceClient:
        """One that logs in by the credential of this name, or by a wrong secret."""
        ...
