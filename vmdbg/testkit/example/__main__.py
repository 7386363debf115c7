# SPDX-License-Identifier: GPL-2.0-or-later
"""`python -m vmdbg.testkit.example DIRECTORY`: copy the example's hypervisor there, to begin with."""

from __future__ import annotations

import shutil
import sys
from importlib.resources import as_file, files
from pathlib import Path

NAMES = ("hypervisor.S", "guest.S", "hypervisor.ld", "Makefile", "hypervisor.elf", "guest.elf")


def main(words: list[str]) -> int:
    if len(words) != 1:
        print("usage: python -m vmdbg.testkit.example DIRECTORY", file=sys.stderr)
        return 2
    folder = Path(words[0])
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        print(f"{folder}: {error.strerror}; name a directory that is not there yet", file=sys.stderr)
        return 2
    for name in NAMES:
        with as_file(files("vmdbg.testkit.example") / name) as source:
            shutil.copyfile(source, folder / name)
    print(f"{folder}: {' '.join(NAMES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
