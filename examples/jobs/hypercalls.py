# SPDX-License-Identifier: GPL-2.0-or-later
# /// job
# image = "../hypervisor/build/hypervisor.elf"
# options = { append = "guests=2" }
# status = 1
# ///
"""The PAE guest takes each #GP that it asks for: `machine` is a vmdbg.Machine before its first instruction."""

machine.run(until="guest-start")  # noqa: F821 - the job's
machine.run()  # noqa: F821
reads = machine.exits(code="MSR")  # noqa: F821
assert len(reads) > 100, f"{len(reads)} accesses to MSRs"
assert "#GP taken 160" in machine.serial  # noqa: F821
