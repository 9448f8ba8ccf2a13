"""The guest's initramfs: busybox and the few modules that reach the host's root."""

import shutil
import subprocess
from pathlib import Path

from kernel import GuestUnavailable, Kernel, output_of, tool

HERE = Path(__file__).resolve().parent
MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
MOUNT_POINTS = ("proc", "sys", "dev", "host", "writes", "root")


def write_initramfs(kernel: Kernel, scratch: Path) -> Path:
    tree = scratch / "initramfs"
    for name in ("bin", "modules", *MOUNT_POINTS):
        (tree / name).mkdir(parents=True)
    shutil.copy(tool("busybox"), tree / "bin" / "busybox")
    shutil.copy(HERE / "initramfs-init", tree / "init")
    (tree / "init").chmod(0o755)
    for position, module in enumerate(_with_dependencies(kernel)):
        shutil.copy(module, tree / "modules" / f"{position:02}-{module.name}")
    return _pack(tree)


def _with_dependencies(kernel: Kernel) -> list[Path]:
    """Module files in the order in which insmod accepts them"""
    show = ["modprobe", "-d", str(kernel.root), "-S", kernel.version, "--show-depends", "--all", *MODULES]
    lines = [line.split(maxsplit=1) for line in output_of(show).splitlines()]
    return list(dict.fromkeys(Path(line[1].strip()) for line in lines if line[0] == "insmod"))


def _pack(tree: Path) -> Path:
    archive = tree.with_suffix(".cpio")
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    # Not compressed: unpacking would run in the emulated processor.
    with archive.open("wb") as out:
        pack = [tool("cpio"), "--create", "--format=newc", "--quiet"]
        done = subprocess.run(pack, cwd=tree, input=names.encode(), stdout=out, check=False)
    if done.returncode:
        raise GuestUnavailable(f"cpio failed with status {done.returncode}")
    return archive
