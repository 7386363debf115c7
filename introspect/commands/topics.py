"""The commands by what they are about, as `help` and the documentation group them."""

from collections.abc import Iterable, Iterator, Mapping

from introspect.commands.registry import Command

__all__ = ["MORE", "TOPICS", "by_topic", "topic_of"]

TOPICS: Mapping[str, tuple[str, ...]] = {
    "Who is there": (
        "guests", "context", "here", "guest", "arch", "symbols", "space", "inferior", "thread", "why", "time", "fingerprint",
        "help",
    ),
    "Registers and descriptors": ("regs", "gdt", "ldt", "idt", "tss", "msr", "cpuid"),
    "Memory and code": (
        "x", "xp", "stack", "print", "expect", "disasm", "bt", "sym", "search", "dump", "load", "save core",
    ),
    "Address translation and isolation": ("walk", "npt", "pt", "who-maps", "audit isolation", "tlb audit"),
    "VMCBs and VMRUN": (
        "vmcb", "vmcb diff", "vmcb watch", "vmcb record", "vmrun why", "rules", "clean-bits check", "intercepts", "iopm", "msrpm",
        "avic",
    ),
    "Exits, interrupts and leaks": ("exits", "would-exit", "why-no-irq", "leak check", "leak record"),
    "Stopping and stepping": (
        "continue", "step", "next", "stepi", "nexti", "finish", "until", "interrupt", "restart", "break", "tbreak", "points",
        "delete", "enable", "disable", "breakpoints", "tracepoints", "watch", "break-range", "catch", "tcatch", "stop-on",
        "stop-at", "follow", "step-into-guest", "sstep", "debug",
    ),
    "Snapshots": ("snapshot", "snapshots", "restore", "snapshot restore", "snapshot save", "snapshot delete"),
    "Platform and devices": (
        "mtree", "devices", "lapic", "ioapic", "pic", "pit", "rtc", "pci", "dma", "send",
    ),
    "IOMMU": (
        "iommu", "iommu devices", "iommu walk", "iommu map", "iommu pasids", "iommu tlb", "iommu events", "iommu requests",
        "iommu ga-log", "iommu commands", "iommu irt", "dma try", "irq try",
    ),
    "SKINIT, DEV and TPM": ("skinit verify", "skinit trace", "dev", "tpm pcr", "tpm log"),
    "This console": (
        "set", "alias", "unalias", "echo", "source", "edit", "py", "shell", "tui", "quit",
    ),
}  # fmt: skip
"""Names, in the order in which they are shown; not every front end has all of them."""
MORE = "More"
"""Of what no topic names: users' own commands, for one."""

_TOPIC = {name: topic for topic, names in TOPICS.items() for name in names}


def topic_of(name: str) -> str:
    return _TOPIC.get(name, MORE)


def by_topic(commands: Iterable[Command]) -> Iterator[tuple[str, list[Command]]]:
    """The topics that have some of the commands, in order."""
    known = {command.name: command for command in commands}
    for topic, names in TOPICS.items():
        found = [known.pop(name) for name in names if name in known]
        if found:
            yield topic, found
    if known:
        yield MORE, list(known.values())
