# SPDX-License-Identifier: GPL-2.0-or-later
"""A small suite on a small hypervisor, both complete: `pytest --pyargs vmdbg.testkit.example` shows that all is in its place.

`hypervisor.S` and `guest.S` are the program, `test_example.py` shows each part of the plugin once.  Copy it to begin with.
"""
