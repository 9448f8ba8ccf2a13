"""Entry point of `skynetvpn-agent`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        from agent import cli  # here, where a Ctrl-C is no traceback

        return cli.main(arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
