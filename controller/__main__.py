"""Entry point of `skynetvpn-controller`."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from controller import cli  # here, where a Ctrl-C is no traceback

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
