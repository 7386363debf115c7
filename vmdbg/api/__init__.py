# SPDX-License-Identifier: GPL-2.0-or-later
"""The Python API: `import vmdbg`, then `vmdbg.Machine(image)`.  docs/api.md begins with a first script.

`vmdbg` itself has the names for users; they live in the modules of this package.
"""
