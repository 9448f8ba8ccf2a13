"""The named programs that are Python have an environment of their own: the product's stays as it is installed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_REQUIREMENTS = _ROOT / "requirements" / "bench.txt"
_DIRECTORY = _ROOT / ".cache" / "bench-venv"


def python() -> str:
    """The interpreter of the environment, made anew when the requirements changed; raise RuntimeError."""
    interpreter, stamp = _DIRECTORY / "bin" / "python", _DIRECTORY / "installed"
    wanted = hashlib.sha256(_REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return str(interpreter)
    shutil.rmtree(_DIRECTORY, ignore_errors=True)
    _DIRECTORY.parent.mkdir(exist_ok=True)
    _run(sys.executable, "-m", "venv", str(_DIRECTORY))
    _run(str(interpreter), "-m", "pip", "install", "-q", "--require-hashes", "-r", str(_REQUIREMENTS))
    stamp.write_text(wanted)
    return str(interpreter)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv[:4])} failed: {done.stderr.strip()[-500:]}")
