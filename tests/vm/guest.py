"""Runs one command as root under Debian's own kernel, in a QEMU guest with this machine's root (writes are lost).

The exit status is the command's; 124: the time ran out; 125: the guest could not start or died before the command.
"""

import argparse
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from initramfs import write_initramfs
from kernel import SYSTEM_PATH, GuestUnavailable, Kernel, kernel, tool

TIMED_OUT = 124
GUEST_DIED = 125
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GUEST_INIT = Path(__file__).resolve().parent / "guest-init"
GUEST_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "SKYNETVPN_KERNEL_TESTS": "1",
    "SKYNETVPN_TEST_SLOWDOWN": "5",
}
# A reset must end QEMU: both the guest's last step and a panic are one. Its tests of its ciphers take long, and so does
# a look at any clock but the processor's own, which it trusts only when told to.
KERNEL_COMMAND_LINE = (
    "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr audit=0 random.trust_cpu=on cryptomgr.notests "
    "tsc=reliable"
)
CONSOLE_TAIL_LINES = 25


def main() -> int:
    options = _options()
    for number in ENDING_SIGNALS:
        signal.signal(number, _leave)
    try:
        with tempfile.TemporaryDirectory(prefix="skynetvpn-guest-") as scratch:
            return _run(options, Path(scratch))
    except GuestUnavailable as error:
        print(f"tests/vm/run: {error}", file=sys.stderr)
        return GUEST_DIED
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Ends by an exception, so that the guest and the scratch folder go away on a signal too"""
    for other in ENDING_SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # a second signal would interrupt the cleaning
    sys.exit(128 + number)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/vm/run", description=__doc__)
    parser.add_argument("-t", dest="seconds", type=float, default=600, help="time limit with the boot (%(default)s)")
    parser.add_argument("-m", dest="memory", type=int, default=2048, help="MB, all writes live there (%(default)s)")
    parser.add_argument("-c", dest="cpus", type=int, default=min(2, os.cpu_count() or 1), help="(%(default)s)")
    parser.add_argument("-v", dest="verbose", action="store_true", help="show the kernel's console at the end")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, run in the current folder")
    return parser.parse_args()


def _run(options: argparse.Namespace, scratch: Path) -> int:
    booted = kernel()
    initramfs = write_initramfs(booted, scratch)
    share = _share(booted, options.command, scratch)
    console = scratch / "console"
    argv = _qemu(booted, initramfs, share, console, options)
    deadline = time.monotonic() + options.seconds
    # QEMU takes the end of its standard input for a hang-up of the guest's port: give it one that stays open.
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as qemu:
        try:
            in_time = _relay(qemu, deadline)
        finally:
            qemu.kill()
    status = _read(share / "status").strip()
    if options.verbose:
        uptime = _read(share / "uptime").strip()
        print(f"tests/vm/run: the command began {uptime} s after the kernel\n{_read(console)}", file=sys.stderr)
    if status:
        return int(status)
    if not in_time:
        print(f"tests/vm/run: not finished after {options.seconds:g} s", file=sys.stderr)
        return TIMED_OUT
    tail = "\n".join(_read(console).splitlines()[-CONSOLE_TAIL_LINES:])
    raise GuestUnavailable(f"the guest died; the end of its console:\n{tail}")


def _share(booted: Kernel, command: list[str], scratch: Path) -> Path:
    """The folder that the guest can write to: it finds its orders there and leaves the status"""
    share = scratch / "share"
    share.mkdir()
    shutil.copy(GUEST_INIT, share / "init")
    (share / "modules").write_text(f"{booted.modules}\n")
    environment = {**GUEST_ENVIRONMENT, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}".lstrip(":")}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    enter = f"cd {shlex.quote(str(Path.cwd()))} || exit {GUEST_DIED}"
    (share / "command").write_text("\n".join([*exports, enter, f"exec {shlex.join(command)}"]) + "\n")
    return share


def _qemu(booted: Kernel, initramfs: Path, share: Path, console: Path, options: argparse.Namespace) -> list[str]:
    # setpriv ends QEMU even when this process is killed with SIGKILL.
    argv = [tool("setpriv"), "--pdeathsig", "KILL", "--", tool("qemu-system-x86_64")]
    argv += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    # Without its instructions for fast copies: emulated, they go byte by byte and are the slowest of all.
    argv += ["-machine", "q35", "-accel", "tcg", "-cpu", "max,-erms,-fsrm"]
    argv += ["-m", str(options.memory), "-smp", str(options.cpus)]
    argv += ["-kernel", str(booted.image), "-initrd", str(initramfs), "-append", KERNEL_COMMAND_LINE]
    argv += ["-serial", f"file:{console}"]
    # A port and not a console: QEMU drops a console's output when its reader is slow, and a terminal changes bytes.
    argv += ["-chardev", "stdio,id=output,signal=off", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=output"]
    argv += ["-fsdev", "local,id=hostroot,path=/,security_model=none,multidevs=remap,readonly=on"]
    argv += ["-device", "virtio-9p-pci,fsdev=hostroot,mount_tag=hostroot"]
    argv += ["-fsdev", f"local,id=share,path={share},security_model=none"]
    argv += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]
    return argv


def _relay(qemu: subprocess.Popen[bytes], deadline: float) -> bool:
    """Copies the guest's output to ours until the guest ends; False when the time ran out"""
    assert qemu.stdout is not None
    output = qemu.stdout.fileno()
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([output], [], [], left)
        if readable:
            chunk = os.read(output, 65536)
            if not chunk:
                return True
            while chunk:
                chunk = chunk[os.write(sys.stdout.fileno(), chunk) :]
    return False


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
