"""Environments of their own: for the named programs that are Python, and for an agent as a node has it."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def python(name: str) -> str:
    """The interpreter with what requirements/<name>.txt lists, and nothing else; raise RuntimeError.

    The environment is made anew when the requirements changed.
    """
    requirements = _ROOT / "requirements" / f"{name}.txt"
    directory = _ROOT / ".cache" / f"{name}-venv"
    interpreter, stamp = directory / "bin" / "python", directory / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(interpreter)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(exist_ok=True)
    _run(sys.executable, "-m", "venv", str(directory))
    _run(str(interpreter), "-m", "pip", "install", "-q", "--require-hashes", "-r", str(requirements))
    stamp.write_text(wanted)
    return str(interpreter)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-500:]}")
