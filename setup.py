# SPDX-License-Identifier: GPL-2.0-or-later
"""The build's part that pyproject.toml cannot say: `vmdbg demo` needs a hypervisor, compiled where the package is built."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCE = Path("examples/hypervisor")
NAMED = "/usr/src/vmdbg/examples/hypervisor"
"""Where debug information says that the sources are. They are not: gdb finds them in its working directory."""
MADE = ("*.o", "*.bin", "__pycache__")
"""What nobody needs once it is linked."""


def lacking() -> str | None:
    """What there is not of the tools that compile it."""
    for tool in ("make", "gcc", "ld", "objcopy"):
        if shutil.which(tool) is None:
            return f"no {tool} here"
    machine = subprocess.run(["gcc", "-dumpmachine"], capture_output=True, text=True).stdout.strip()
    return None if machine.startswith("x86_64") else f"gcc is one for {machine or 'unknown machines'}, not for x86-64"


class WithDemo(build_py):
    """Beside the modules, examples/hypervisor: its sources, for gdb and the reader, and its images in `build`."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then vmdbg finds it where it is
            self._compile(Path(self.build_lib) / "vmdbg/demo/hypervisor")

    def _compile(self, into: Path) -> None:
        shutil.rmtree(into, ignore_errors=True)
        problem = lacking()
        if problem is None:
            shutil.copytree(SOURCE, into, ignore=shutil.ignore_patterns("build"))
            # Debug information tells no paths of the machine that builds: the same sources give the same package.
            compiler = f"CC=gcc -ffile-prefix-map={into.resolve()}={NAMED}"
            made = subprocess.run(["make", "-C", str(into), compiler], capture_output=True, text=True)
            if made.returncode == 0:
                for pattern in MADE:
                    for path in into.rglob(pattern):
                        path.unlink()
                return
            problem = f"it does not compile here:\n{made.stderr.strip()}\n"
            shutil.rmtree(into)
        self.warn(f"vmdbg is built without its demo hypervisor ({problem}): `vmdbg demo` will say that it is not there")


class Reproducible(build_ext):
    """Debug information without paths, here too."""

    def build_extensions(self) -> None:
        if not self.editable_mode:
            for extension in self.extensions:
                extension.extra_compile_args.append(f"-ffile-prefix-map={Path.cwd()}=.")
        super().build_extensions()


setup(cmdclass={"build_py": WithDemo, "build_ext": Reproducible})
