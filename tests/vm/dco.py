"""OpenVPN's data channel offload for the guest's kernel: Debian's source of the module, built in the cache."""

import re
import sys
import tempfile
from pathlib import Path

from kernel import CACHE, SETUP_HINT, GuestUnavailable, download, kernel, locked, output_of

MODULE = CACHE.parent / "ovpn-dco" / "ovpn-dco-v2.ko"
SOURCE_PACKAGE = "openvpn-dco-dkms"


def module() -> Path:
    """The module; built anew where the kernel has changed"""
    version = kernel().version
    with locked(MODULE.parent):
        if not MODULE.exists() or _built_for(MODULE) != version:
            _build(version)
    return MODULE


def _built_for(path: Path) -> str:
    return output_of(["modinfo", "-F", "vermagic", str(path)]).split(maxsplit=1)[0]


def _build(version: str) -> None:
    print(f"tests/vm: building ovpn-dco-v2 for {version}", file=sys.stderr)
    common = f"linux-headers-{re.sub(r'-[a-z0-9]+$', '', version)}-common"
    kbuild = f"linux-kbuild-{'.'.join(version.split('.')[:2])}"
    with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="ovpn-dco-") as scratch:
        root = Path(scratch) / "root"
        try:
            download([f"linux-headers-{version}", common, kbuild, SOURCE_PACKAGE], root)
        except GuestUnavailable as error:
            raise GuestUnavailable(
                f"{error}\nwhere Debian has a newer kernel by now: delete {CACHE}, and {SETUP_HINT}"
            ) from None
        headers = root / "usr" / "src" / f"linux-headers-{version}"
        (headers / "Makefile").write_text(f"include {root}/usr/src/{common}/Makefile\n")
        (source,) = root.glob("usr/src/ovpn-dco-*")
        output_of(["make", f"KERNEL_SRC={headers}", f"REVISION={source.name.removeprefix('ovpn-dco-')}"], cwd=source)
        (built,) = source.rglob(MODULE.name)
        output_of(["strip", "--strip-debug", str(built)])
        MODULE.parent.mkdir(exist_ok=True)
        built.rename(MODULE)


if __name__ == "__main__":
    try:
        module()
    except GuestUnavailable as unavailable:
        sys.exit(f"tests/vm: {unavailable}")
