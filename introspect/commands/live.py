"""What a context may know beyond memory and the registers of inferiors: of one VMCB, and of the processor behind it."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from introspect.commands.context import Context, threads_of
from introspect.processor_state import ProcessorState
from introspect.vmcb import VMCB

__all__ = ["Live", "on_processor", "processor_state", "vmcb_registers"]


@runtime_checkable
class Live(Protocol):
    """A context with processors; a dump is none."""

    def processor_state(self, vmcb: int | None) -> ProcessorState | None:
        """Of the processor that the guest of a VMCB is on, or was on last; with None, of the hypervisor's that is meant."""

    def hidden_registers(self, vmcb: int) -> Mapping[str, int]:
        """What decides about a guest's instructions besides the registers: see `introspect.subject.Subject`."""


def processor_state(context: Context, vmcb: int | None) -> ProcessorState | None:
    return context.processor_state(vmcb) if isinstance(context, Live) else None


def on_processor(state: ProcessorState | None, vmcb: int) -> bool:
    """Whether the guest of a VMCB executes."""
    return state is not None and state.vmcb == vmcb


def vmcb_registers(context: Context, vmcb: int, contents: bytes) -> Mapping[str, int]:
    """What is known of a guest's registers: its save area, and what the context knows better or besides."""
    known: dict[str, int] = {}
    owner = next((guest for guest in context.guests if vmcb in guest.vmcbs), None)
    if owner is not None:
        threads, index = threads_of(context, owner.number), owner.vmcbs.index(vmcb)
        known.update(threads[index] if index < len(threads) else {})
        known.update(context.hidden_registers(vmcb) if isinstance(context, Live) else {})
    return {**VMCB.decode(contents), **known}
