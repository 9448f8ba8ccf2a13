"""Debian's stock kernel for the guest: downloaded with apt, unpacked into the project's cache, never installed."""

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache" / "kernel"
META_PACKAGE = "linux-image-amd64"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
XZ_MAGIC = b"\xfd7zXZ\x00"
ELF_MAGIC = b"\x7fELF"
SETUP_HINT = "run tests/vm/setup as root"


class GuestUnavailable(Exception):
    """The guest cannot be started on this machine; the text says what to do"""


@dataclass(frozen=True, slots=True)
class Kernel:
    version: str
    root: Path  # the package as unpacked: boot/ and lib/modules/

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinux-{self.version}"

    @property
    def modules(self) -> Path:
        return self.root / "lib" / "modules" / self.version


def tool(name: str) -> str:
    # An ordinary user's PATH lacks the sbin folders, where depmod and modprobe live.
    path = shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)
    if path is None:
        raise GuestUnavailable(f"the program {name} is missing: {SETUP_HINT}")
    return path


def output_of(argv: Sequence[str], cwd: Path | None = None) -> str:
    command = [tool(argv[0]), *argv[1:]]
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise GuestUnavailable(f"{' '.join(argv)} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def kernel() -> Kernel:
    """The cached kernel; the first call downloads it"""
    if os.uname().machine != "x86_64":
        raise GuestUnavailable(f"the guest is not supported on {os.uname().machine}, only on amd64")
    if not CACHE.exists():
        with locked(CACHE):
            if not CACHE.exists():
                _download()
    images = list(CACHE.glob("boot/vmlinux-*"))
    if len(images) != 1:
        raise GuestUnavailable(f"{CACHE} holds {len(images)} kernels instead of one: delete that folder and try again")
    return Kernel(version=images[0].name.removeprefix("vmlinux-"), root=CACHE)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps others from filling this folder of the cache at the same time"""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(packages: Sequence[str], root: Path) -> None:
    """Unpacks Debian packages into a folder, all in one; nothing is installed"""
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="debs-") as debs:
        # apt's own sandbox user could not write into a folder of ours.
        try:
            output_of(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages], cwd=Path(debs))
        except GuestUnavailable as error:
            raise GuestUnavailable(f"{error}\nwhen the package lists are old or missing: {SETUP_HINT}") from None
        for deb in Path(debs).glob("*.deb"):
            output_of(["dpkg", "-x", str(deb), str(root)])


def _download() -> None:
    package = _real_package()
    print(f"tests/vm: downloading {package}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="kernel-") as scratch:
        unpacked = Path(scratch) / "unpacked"
        download([package], unpacked)
        (version,) = (path.name for path in unpacked.glob("lib/modules/*"))
        output_of(["depmod", "-b", str(unpacked), version])
        compressed = unpacked / "boot" / f"vmlinuz-{version}"
        compressed.with_name(f"vmlinux-{version}").write_bytes(_decompressed(compressed.read_bytes()))
        unpacked.chmod(0o755)
        unpacked.rename(CACHE)  # in one step: an interrupted download leaves no half a cache


def _decompressed(image: bytes) -> bytes:
    """The ELF kernel within a bzImage, which would need four seconds to unpack itself in the emulated processor"""
    start = image.find(XZ_MAGIC)
    try:
        elf = lzma.LZMADecompressor().decompress(image[start:]) if start >= 0 else b""
    except lzma.LZMAError:
        elf = b""
    if not elf.startswith(ELF_MAGIC):
        raise GuestUnavailable("the kernel's image is not compressed with xz, as Debian 12's is")
    return elf


def _real_package() -> str:
    found = re.search(r"Depends: (linux-image-\d\S+)", output_of(["apt-cache", "depends", META_PACKAGE]))
    if found is None:
        raise GuestUnavailable(f"apt does not know what {META_PACKAGE} depends on: {SETUP_HINT}")
    return found[1]


if __name__ == "__main__":
    try:
        kernel()
    except GuestUnavailable as unavailable:
        sys.exit(f"tests/vm: {unavailable}")
