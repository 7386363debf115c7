"""The commands: each is one entry of a registry, with typed results that render as text and as JSON."""

from introspect.commands import (
    avic,
    backtrace,
    cpuid,
    descriptors,
    disassemble,
    examine,
    exits,
    expectation,
    files,
    guests,
    iommu,
    iommu_interrupts,
    iommu_logs,
    iommu_reach,
    leaks,
    mappers,
    msr,
    permissions,
    registers,
    search,
    situation,
    skinit,
    symbols,
    tables,
    vmcb,
    walk,
    why_no_irq,
    would_exit,
)
from introspect.commands.context import (
    HOST_NUMBER,
    Cancelled,
    CommandError,
    Context,
    ExitRecord,
    GuestView,
    HostView,
    Inferior,
    Result,
    exit_status,
)
from introspect.commands.help import help_command
from introspect.commands.registry import Arguments, Command, Completion, Registry, worded
from introspect.commands.render import columns, jsonable

__all__ = [
    "HOST_NUMBER",
    "Arguments",
    "Cancelled",
    "Command",
    "CommandError",
    "Completion",
    "Context",
    "ExitRecord",
    "GuestView",
    "HostView",
    "Inferior",
    "Registry",
    "Result",
    "columns",
    "default_registry",
    "exit_status",
    "jsonable",
    "run_line",
    "worded",
]  # fmt: skip


def default_registry() -> Registry:
    """A registry of all commands of this package, to which a machine may add its own."""
    modules = (
        guests,
        situation,
        registers,
        descriptors,
        msr,
        cpuid,
        examine,
        expectation,
        disassemble,
        backtrace,
        symbols,
        search,
        walk,
        tables,
        mappers,
        vmcb,
        exits,
        permissions,
        avic,
        iommu,
        iommu_reach,
        iommu_logs,
        iommu_interrupts,
        leaks,
        skinit,
        would_exit,
        why_no_irq,
        files,
    )
    registry = Registry(command for module in modules for command in module.COMMANDS)
    registry.add(help_command(registry))
    return registry


_DEFAULT = default_registry()


def run_line(context: Context, line: str) -> Result:
    """Run one line with the commands of this package; `CommandError` for anything wrong with it."""
    return _DEFAULT.run_line(context, line)
