# SPDX-License-Identifier: GPL-2.0-or-later
"""`vmdbg`, and `python -m vmdbg`."""

import sys


def main() -> int:
    """Returns the process exit status.  The modules are read here: that takes a second, in which ^C is no error either."""
    try:
        from vmdbg import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
