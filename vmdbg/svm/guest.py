"""What a processor keeps of the VMCB while its guest runs: the control area, read once at VMRUN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from introspect.vmcb import INT_STATE, MISC_CTL, MISC_CTL2, V_INTR, VMCB

if TYPE_CHECKING:
    from .avic import Avic

_CONTROL = VMCB.codec(
    "iopm_base_pa", "msrpm_base_pa", "tsc_offset", "guest_asid", "tlb_control", "v_intr", "int_state", "misc_ctl", "eventinj",
    "n_cr3", "misc_ctl2",
).unpack  # fmt: skip
_WORDS = VMCB.codec(
    "intercept_cr_read", "intercept_cr_write", "intercept_dr_read", "intercept_dr_write", "intercept_exceptions",
    "intercept_misc1", "intercept_misc2", "intercept_misc3", "pause_filter_threshold", "pause_filter_count",
).unpack  # fmt: skip

TASK_SWITCH, FERR_FREEZE = 0x7D, 0x7E
_VMLOAD_VMSAVE = 3 << 2
"""Of intercept word 4."""
_NP, _V_INTR_MASKING, _V_IRQ, _SHADOW = MISC_CTL.np_enable, V_INTR.v_intr_masking, V_INTR.v_irq, INT_STATE.interrupt_shadow


class Guest:
    """A guest that is running, between VMRUN and #VMEXIT.  Addresses are system-physical."""

    __slots__ = (
        "asid", "avic", "eventinj", "gmet", "host_if", "host_nmi_blocked", "host_pat", "iopm", "last_pause", "lbr_virtual",
        "misc_ctl", "misc_ctl2", "msrpm", "n_cr3", "np", "pause_count", "pause_left", "pause_threshold", "q", "shadow",
        "tlb_control", "tsc_offset", "v_gif_enabled", "v_intr", "v_intr_masking", "v_nmi_enabled", "v_tpr", "view",
        "virtual_vmload", "vmcb", "vmload_exits", "words",
    )  # fmt: skip

    def __init__(
        self, vmcb: int, view: memoryview, host_if: bool, loaded: memoryview | None = None, host_64: bool = True
    ) -> None:
        """`view` is the VMCB in memory; `loaded` is as the processor sees it, if that is something else.  `host_64`: VMRUN was
        executed in 64-bit mode."""
        self.vmcb = vmcb
        self.view = view
        self.q = view.cast("Q")
        loaded = view if loaded is None else loaded
        (
            cr_read, cr_write, dr_read, dr_write, exceptions, misc1, misc2, misc3, self.pause_threshold, self.pause_count,
        ) = _WORDS(loaded, 0)  # fmt: skip
        (
            self.iopm, self.msrpm, self.tsc_offset, self.asid, self.tlb_control, self.v_intr, int_state, self.misc_ctl,
            self.eventinj, self.n_cr3, self.misc_ctl2,
        ) = _CONTROL(loaded, 0)  # fmt: skip
        self.np = bool(self.misc_ctl & _NP)
        """Nested paging is enabled."""
        asks = bool(self.misc_ctl2 & MISC_CTL2.v_vmload_vmsave)
        self.virtual_vmload = asks and self.np and host_64
        """VMLOAD and VMSAVE that are not intercepted take guest-physical addresses (APM2 15.33.1)."""
        self.vmload_exits = asks and not self.virtual_vmload
        """That is asked for and is not to be had: they exit, intercepted or not."""
        if self.vmload_exits:
            misc2 |= _VMLOAD_VMSAVE
        self.words = (cr_read | cr_write << 16, dr_read | dr_write << 16, exceptions, misc1, misc2, misc3)
        self.gmet = bool(self.misc_ctl & MISC_CTL.gmet_enable)
        """Guest mode execute trap is (APM2 15.25.13)."""
        self.v_intr_masking = bool(self.v_intr & _V_INTR_MASKING)
        self.shadow = bool(int_state & _SHADOW)
        self.v_tpr = self.v_intr & 0xFF
        self.v_gif_enabled = bool(self.v_intr & V_INTR.v_gif_enable)
        self.v_nmi_enabled = bool(self.v_intr & V_INTR.v_nmi_enable)
        self.lbr_virtual = bool(self.misc_ctl2 & MISC_CTL2.lbr_virt)
        self.host_if = host_if
        self.avic: Avic | None = None
        """The virtual APIC.  With it, V_IRQ and what belongs to it do not count (APM2 15.29.4.1)."""
        self.host_pat = 0
        """With nested paging: the host's PAT MSR; the processor's is the guest's then (APM2 15.25.2)."""
        self.host_nmi_blocked = False
        """With virtual NMIs: whether physical ones are masked.  The processor's own mask is the guest's then (APM2 15.21.10)."""
        self.load_pause_filter()

    @property
    def is_common(self) -> bool:
        """Whether VMRUN and #VMEXIT switch nothing for it but what they switch for every guest."""
        special = self.v_gif_enabled or self.v_nmi_enabled or self.lbr_virtual or self.vmload_exits
        return not (special or self.avic is not None)

    def intercepts(self, code: int) -> bool:
        """Whether the intercept bit of an exit code below 0xC0 is set."""
        return bool(self.words[code >> 5] >> (code & 31) & 1)

    def load_pause_filter(self) -> None:
        """VMRUN: the counter begins anew."""
        self.pause_left: int = self.pause_count
        self.last_pause = -1 << 64

    def pause(self, now: int) -> bool:
        """PAUSE at guest time `now`: whether an intercept makes it exit (APM2 15.14.4).

        Without a threshold the last of `pause_count` PAUSEs exits.  With one, a PAUSE more than that many ticks after the one
        before begins a new loop, of which the first is not counted.
        """
        if not self.pause_count:
            return True
        if self.pause_threshold:
            loop, self.last_pause = now - self.last_pause <= self.pause_threshold, now
            self.pause_left = self.pause_left - 1 if loop else self.pause_count
            return self.pause_left < 0
        self.pause_left -= 1
        return self.pause_left <= 0

    @property
    def intercepts_ferr(self) -> bool:
        return self.intercepts(FERR_FREEZE)

    @property
    def intercepts_task_switch(self) -> bool:
        return self.intercepts(TASK_SWITCH)

    @property
    def v_irq(self) -> bool:
        return bool(self.v_intr & _V_IRQ)

    @property
    def v_gif(self) -> bool:
        """Whether virtual events are let through: without a virtual GIF they are (APM2 15.33.2)."""
        return not self.v_gif_enabled or bool(self.v_intr & V_INTR.v_gif)

    @property
    def v_nmi_pending(self) -> bool:
        """V_NMI with virtual NMIs on (APM2 15.21.10); the mask and the shadow come besides."""
        return self.v_nmi_enabled and bool(self.v_intr & V_INTR.v_nmi) and self.v_gif

    @property
    def v_intr_deliverable(self) -> bool:
        """V_IRQ with its priority above V_TPR, or V_IGN_TPR (APM2 15.21.4), or a request to the virtual APIC; IF, GIF and the
        shadow come besides."""
        if self.avic is not None:
            return bool(self.avic.request)
        word = self.v_intr
        if not word & _V_IRQ or not self.v_gif:
            return False
        return bool(word & V_INTR.v_ign_tpr) or V_INTR.get(word, "v_intr_prio") > self.v_tpr & 0xF

    @property
    def v_intr_vector(self) -> int:
        return V_INTR.get(self.v_intr, "v_intr_vector")
