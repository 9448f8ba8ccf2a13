"""A Debian 12 of its own that systemd has booted: .cache/machine/root (made by `setup`) under systemd-nspawn.

What is written inside is in memory, and lost with the machine. The project is at /opt/skynetvpn, read-only, with an
environment of the machine's own Python. The network is a namespace of the test's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.netns import CommandFailed, Namespace, wait_until

PROJECT = Path(__file__).parents[2]
ROOT = PROJECT / ".cache/machine/root"
HOME = Path("/opt/skynetvpn")
PATIENCE = 60.0 * int(os.environ.get("SKYNETVPN_TEST_SLOWDOWN", "1"))  # seconds; other work may keep the machine busy
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PARTS = ("agent", "controller", "shared", "systemd")
_SYSCTL = {"SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"}  # its own network's settings are its own to make
_DEVICES = ("/dev/ppp",)  # where the kernel has them; /dev/net/tun is there in any case
# systemd wants the unified hierarchy of control groups to itself: here it gets a branch of it, and sees nothing else.
_BOOT = """
set -eu
if ! mountpoint -q /sys/fs/cgroup || [ "$(stat -f -c %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -l /sys/fs/cgroup 2>/dev/null || true
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
mkdir "$1"
echo $$ >"$1/cgroup.procs"
shift
exec systemd-nspawn "$@"
"""


class Machine:
    def __init__(self, *, empty: bool = False) -> None:
        """An empty one has nothing of the project."""
        self.network = Namespace("machine")
        self._parts = () if empty else _PARTS
        self.leader = 0
        self._console = tempfile.TemporaryFile("w+")  # noqa: SIM115 — closed with the machine
        self._nspawn: subprocess.Popen[Any] | None = None

    def __enter__(self) -> Self:
        if not ROOT.is_dir():
            raise FileNotFoundError(f"{ROOT} is missing: run `make pytest`, which makes it")
        self.network.__enter__()
        return self

    def boot(self) -> None:
        name = self.network.name
        group = _cgroups() / name
        bound = [f"--bind-ro={PROJECT / part}:{HOME / part}" for part in self._parts]
        bound += [f"--bind={device}" for device in _DEVICES if Path(device).exists()]
        options = (
            *(f"--directory={ROOT}", "--volatile=overlay", f"--machine={name}", "--boot", "--quiet"),
            *("--register=no", "--keep-unit", "--console=pipe", "--resolv-conf=off", "--timezone=off"),
            *(f"--network-namespace-path={self.network.path}", *bound),
            # What a real host's systemd has: the network, and the device rules of its services.
            *("--capability=CAP_NET_ADMIN,CAP_BPF", "--system-call-filter=bpf pidfd_getfd"),
        )
        self._nspawn = subprocess.Popen(
            ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", _BOOT, "boot", str(group), *options),
            env={"PATH": _PATH, "LC_ALL": "C", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", **_SYSCTL},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
        )
        self.wait(self._booted, "the machine does not boot")
        if not self._parts:
            self.run("rm", "-r", str(HOME))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._nspawn is not None:
                self._nspawn.send_signal(signal.SIGTERM)  # it has systemd power off
                try:
                    self._nspawn.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    self._nspawn.kill()
                    self._nspawn.wait()
        finally:
            self.network.close()
            self._console.close()
            _remove(self.network.name)

    def run(self, *argv: str, user: str = "root", stdin: str | None = None, check: bool = True) -> str:
        """Run a command inside, as an administrator does; return what it printed."""
        done = subprocess.run(
            (*self._inside(), *(() if user == "root" else ("runuser", "-u", user, "--")), *argv),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if check and done.returncode:
            raise CommandFailed(
                f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}"
            )
        return done.stdout

    def unit(self, name: str, *properties: str) -> list[str]:
        """These properties of a unit."""
        told = self.run("systemctl", "show", name, *(f"--property={each}" for each in properties))
        found = dict(line.partition("=")[::2] for line in told.splitlines())
        return [found[each] for each in properties]

    def pids(self, command: str) -> list[int]:
        """The processes of this program, as the machine numbers them."""
        return sorted(int(pid) for pid in self.run("pgrep", "-x", command, check=False).split())

    def wait(self, condition: Callable[[], object], otherwise: str, timeout: float = PATIENCE) -> None:
        try:
            wait_until(condition, timeout)
        except TimeoutError as error:
            raise AssertionError(f"{otherwise} within {timeout:g} s\n{self.logs()}") from error

    def logs(self) -> str:
        """What the machine has to say, for messages."""
        if self.leader:
            with contextlib.suppress(subprocess.SubprocessError):
                told = self.run("journalctl", "--no-pager", "--output=cat", check=False).splitlines()
                return "\n".join([line for line in told if "http.request" not in line][-100:])
        self._console.seek(0)
        return self._console.read()

    def _booted(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended with {self._nspawn.returncode}:\n{self.logs()}")
        self.leader = self.leader or _systemd(self._nspawn.pid)
        if not self.leader:
            return False
        return self.run("systemctl", "is-system-running", check=False).strip() in ("running", "degraded")

    def _inside(self) -> tuple[str, ...]:
        environment = (
            "env",
            "-i",
            f"--chdir={HOME if self._parts else '/'}",
            f"PATH={_PATH}",
            "HOME=/root",
            "LC_ALL=C.UTF-8",
        )
        return ("nsenter", f"--target={self.leader}", "--all", *environment)


def _systemd(nspawn: int) -> int:
    """The number of its first process, 0 where there is none yet."""
    children = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split()
    for child in map(int, children):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                return child
    return 0


def _cgroups() -> Path:
    """Our own place in the unified hierarchy, as a machine sees it that has mounted it at /sys/fs/cgroup."""
    (line,) = (line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return Path("/sys/fs/cgroup") / line.removeprefix("0::/")


def _remove(name: str) -> None:
    """The branch of control groups that the machine leaves behind, from its leaves on."""
    for mount in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        branch = mount / _cgroups().relative_to("/sys/fs/cgroup") / name
        for group, _, _ in os.walk(branch, topdown=False):
            with contextlib.suppress(OSError):
                Path(group).rmdir()
