"""Descriptors of processes (pidfd_open(2)): they stay with their process, whoever gets its number next."""

from __future__ import annotations

import errno
import os


def open_process(pid: int) -> int | None:
    """None where the process has ended; Linux says EINVAL of one whose parent is just collecting it. Raises OSError."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
