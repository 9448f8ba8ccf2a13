"""Run a program as on a host of its own: `ip netns exec NS python -m tests.support.ownrun PROGRAM …`.

Userspace WireGuard names its socket after the interface, in one directory for all network namespaces; hosts that are
namespaces of one machine would take each other's. They would also be one boot. `ip netns exec` has given us a mount
namespace already, so both can be ours alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
from pathlib import Path

_DIRECTORY = Path("/run/wireguard")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MS_BIND = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def main(argv: list[str]) -> None:
    _DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    _mount("tmpfs", _DIRECTORY, "tmpfs", 0, "mode=0700")
    boot_id = _DIRECTORY / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    boot_id.chmod(0o444)
    _mount(str(boot_id), _BOOT_ID, "", _MS_BIND, "")
    boot_id.unlink()  # it stays where it is mounted
    os.execvp(argv[0], argv)


def _mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    if _libc.mount(source.encode(), bytes(target), kind.encode(), flags, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {target}: {os.strerror(code)}")


if __name__ == "__main__":
    main(sys.argv[1:])
