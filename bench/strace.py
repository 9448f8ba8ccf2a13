"""Counts what this process tells WireGuard to change, seen by strace at the sockets: none of our own code is asked."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

# Userspace: "set=1" opens an operation. Kernel: generic netlink's first byte is the command, 1 = WG_CMD_SET_DEVICE.
# Netlink of other families (routes, the packet filter) is decoded by strace or comes from other programs.
_USERSPACE = re.compile(r'"set=1\\n')
_KERNEL = re.compile(r'nlmsg_type=(?:wireguard|0x[0-9a-f]+)[^}]*}, "\\x01\\x01')


async def sets_sent(work: Callable[[], Awaitable[object]]) -> int | None:
    """How many set messages went out while the work was done; None where there is no strace."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory(prefix="skynetvpn-strace-") as directory:
        log = Path(directory) / "log"
        calls = "trace=sendto,sendmsg,sendmmsg,write,writev"
        argv = ["strace", "-f", "-x", "-s", "64", "-e", calls, "-o", str(log), "-p", str(os.getpid())]
        tracer = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
        assert tracer.stderr is not None
        try:
            async with asyncio.timeout(60):
                while b"attached" not in (line := await tracer.stderr.readline()):
                    if not line:
                        raise RuntimeError("strace could not attach to this process")
            await work()
        finally:
            if tracer.returncode is None:
                tracer.terminate()
            await tracer.communicate()
        return count_sets(log.read_text(errors="replace"))


def count_sets(log: str) -> int:
    return sum(bool(_USERSPACE.search(line) or _KERNEL.search(line)) for line in log.splitlines())
