"""Start a program that sees one directory in the place of another: `privately.py DIRECTORY PLACE PROGRAM ARGUMENT …`.

Run as a script of its own: it becomes the program. What the machine mounts and unmounts later reaches it too; its
own mount reaches nobody.
"""

from __future__ import annotations

import ctypes
import os
import sys

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000


def main(directory: str, place: str, *argv: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    _check("unshare", libc.unshare(_CLONE_NEWNS))
    _check("mount /", libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    _check(f"mount {directory}", libc.mount(os.fsencode(directory), os.fsencode(place), None, _MS_BIND, None))
    os.execvp(argv[0], argv)  # noqa: S606


def _check(what: str, result: int) -> None:
    if result:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
