"""What a processor holds pending, and whether it may be taken (APM2 8.5, 15.21)."""

from __future__ import annotations

from collections.abc import Iterator

from introspect.exits import ExitCode
from introspect.vmcb import V_INTR
from vmdbg.engine.engine import Engine
from vmdbg.engine.state import CS
from vmdbg.platform.bus import Bus
from vmdbg.platform.cpuid import CpuidConfig
from vmdbg.platform.msrs import VM_CR, VM_CR_R_INIT
from vmdbg.svm import world

from . import smm
from .bits import RFLAGS_IF
from .core import Cpu, ExtInt, Hold, Observer
from .events import DELIVERY, raise_event
from .faults import NMI, SX, Event, Kind
from .reset import init

_V_NMI = -1
"""Among the codes of events: a virtual NMI, which has no intercept."""
_V_PENDING = V_INTR.v_irq | V_INTR.v_nmi
SX_INIT = 1
"""#SX's error code for a redirected INIT (APM2 8.4.3, 15.28)."""


class Pending(Cpu):
    """A processor, as far as events that come from outside its instructions go."""

    def __init__(
        self, index: int, engine: Engine, bus: Bus, cpuid_config: CpuidConfig, extint: ExtInt, observer: Observer
    ) -> None:
        super().__init__(index, engine, bus, cpuid_config, observer)
        self.interrupt_controller = extint

    @property
    def runnable(self) -> bool:
        """Whether the processor has something to do now: code to execute or an event to take."""
        if self.shutdown or self.hold == Hold.STANDS:
            return False
        if self.hold:
            return any(self._leaves(code) for code in self._allowed())
        if self.wait_for_sipi:
            return self.sipi_vector is not None
        return not self.halted or self._wakes()

    def _wakes(self) -> bool:
        """An event ends HLT and MWAIT, whether the guest's hypervisor sees it or the processor takes it; a store MWAIT only."""
        if self.stored_to(self.awaited):
            return True
        outside = self.smm is None and (self.init_pending or self.smi_pending)
        if self.gif and (outside or (self.nmi_pending and not self.nmi_masked)):
            return True  # HLT has ended any shadow
        return self.gif and (
            self._interrupt_allowed(self._physical_if()) or self._virtual_allowed() or self._virtual_nmi_allowed()
        )

    def _physical_pending(self) -> bool:
        return self.extint_level or self.lapic.pending() is not None

    def _physical_if(self) -> bool:
        """The IF that gates physical interrupts: the host's while a guest runs with V_INTR_MASKING (APM2 15.21.1)."""
        guest = self.guest
        if guest is not None and guest.v_intr_masking:
            return guest.host_if
        return bool(self.state.rflags & RFLAGS_IF)

    @property
    def nmi_masked(self) -> bool:
        """Whether physical NMIs are masked: a guest with virtual ones has a mask of its own in their place."""
        guest = self.guest
        return guest.host_nmi_blocked if guest is not None and guest.v_nmi_enabled else self.state.nmi_blocked

    def _virtual_nmi_allowed(self) -> bool:
        guest, s = self.guest, self.state
        return guest is not None and guest.v_nmi_pending and not s.nmi_blocked and not s.shadow

    def _interrupt_allowed(self, enabled: bool) -> bool:
        return enabled and not self.state.shadow and self._physical_pending()

    def _virtual_allowed(self) -> bool:
        guest = self.guest
        return (
            guest is not None and guest.v_intr_deliverable and bool(self.state.rflags & RFLAGS_IF) and not self.state.shadow
        )

    def _allowed(self) -> Iterator[int]:
        """The events that this instruction boundary allows, by the codes of their intercepts, the most urgent one first
        (APM2 8.5, 15.21)."""
        guest, shadow = self.guest, self.state.shadow
        if not self.gif:
            return
        if self.init_pending and self.smm is None:
            yield ExitCode.INIT
        if self.smi_pending and self.smm is None and not shadow:
            yield ExitCode.SMI
        if self.nmi_pending and not self.nmi_masked and not shadow:
            yield ExitCode.NMI
        if self._interrupt_allowed(self._physical_if()):
            yield ExitCode.INTR
        if guest is not None and self._virtual_nmi_allowed():
            yield _V_NMI
        if guest is not None and self._virtual_allowed():
            yield ExitCode.VINTR

    def _leaves(self, code: int) -> bool:
        """Whether an event is one that the guest is left for."""
        guest = self.guest
        if guest is None or code == _V_NMI or not guest.intercepts(code):
            return False
        return code != ExitCode.SMI or not self.msrs.smm_locked

    def take_event(self) -> bool:
        """Take the most urgent event that this instruction boundary allows.  True if one was.

        Held by a debugger, the processor takes those only that lead out of what it holds: the hypervisor gets its CPU back.
        """
        if self.hold == Hold.STANDS:
            return False
        if self.wait_for_sipi:
            return self._start_up()
        code = next((code for code in self._allowed() if not self.hold or self._leaves(code)), None)
        if code is None:
            return False
        if self._leaves(code):
            info = smm.exit_info(self) if code == ExitCode.SMI else ()
            self.halted = False
            world.vmexit(self, code, *info)  # INIT stays pending for the host (APM2 15.13.4), as do the others
        else:
            self._take(code)
        return True

    def _start_up(self) -> bool:
        """The start-up IPI, if it has come (APM2 16.7.1)."""
        vector = self.sipi_vector
        if vector is None:
            return False
        self.sipi_vector = None
        self.wait_for_sipi = False
        s = self.state
        s.set_segment(CS, vector << 8, vector << 12, 0xFFFF, 0x9B)
        s.rip = 0
        s.refresh(0)
        return True

    def _take(self, code: int) -> None:
        """Take an event that nobody intercepts."""
        if code == ExitCode.INIT:
            self.init_pending = False
            if self.msrs.values[VM_CR] & VM_CR_R_INIT:
                raise_event(self, Event(SX, Kind.EXCEPTION, SX_INIT, trap=True))
                return
            init(self)
            self.lapic.init()
            self.wait_for_sipi = self.index != 0
        elif code == ExitCode.SMI:
            self.smi_pending = False
            smm.enter(self)
            self.engine.clock.now += DELIVERY
        elif code == ExitCode.INTR:
            self.halted = False
            vector = self.lapic.pending()
            if vector is not None:
                vector = self.lapic.acknowledge()
            else:
                vector = self.interrupt_controller.acknowledge()
                self.lapic.extint_taken()
            raise_event(self, Event(vector, Kind.INTR))
        elif code == ExitCode.VINTR:
            self.halted = False
            raise_event(self, Event(world.take_virtual_interrupt(self), Kind.INTR))
        else:
            self._take_nmi(code)

    def _take_nmi(self, code: int) -> None:
        guest = self.guest
        if code == _V_NMI and guest is not None:
            guest.v_intr &= ~V_INTR.v_nmi
        else:
            self.nmi_pending = False
        self.halted = False
        self.state.nmi_blocked = True
        raise_event(self, Event(NMI, Kind.NMI))

    def waits_for_window(self) -> bool:
        """Something is pending that only RFLAGS.IF holds back."""
        if not self.gif:
            return False
        guest = self.guest
        flags = self.state.rflags
        if flags & RFLAGS_IF and not self.state.shadow:
            return False
        if self._physical_pending() and (guest is None or not guest.v_intr_masking):
            return True
        return guest is not None and guest.v_intr_deliverable

    def waits_for_nmi(self) -> bool:
        """An NMI is pending, the processor's or a virtual one."""
        return self.nmi_pending or (self.guest is not None and self.guest.v_nmi_pending)

    def quiet(self) -> bool:
        """Nothing is pending at all: the common case, found out with few questions."""
        guest = self.guest
        return not (
            self.extint_level or self.nmi_pending or self.init_pending or self.smi_pending or self.wait_for_sipi
            or (guest is not None and (guest.v_intr & _V_PENDING or (guest.avic is not None and guest.avic.request)))
            or self.lapic.pending() is not None
        )  # fmt: skip
