"""Run a program with a /run/wireguard of its own: `ip netns exec NS python -m tests.support.ownrun PROGRAM …`.

Userspace WireGuard names its socket after the interface, in one directory for all network namespaces; hosts that are
namespaces of one machine would take each other's. `ip netns exec` has given us a mount namespace already.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_DIRECTORY = Path("/run/wireguard")


def main(argv: list[str]) -> None:
    _DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(_DIRECTORY), b"tmpfs", 0, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {_DIRECTORY}: {os.strerror(code)}")
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
