# SPDX-License-Identifier: GPL-2.0-or-later
"""Fields of the VMCB (APM2 appendix B) as properties.

Made by `python -m tests.reference`: change introspect/vmcb.py, not this.
"""

from __future__ import annotations

from introspect.exits import ExitCode
from vmdbg.api.flags import Fields, Value

__all__ = ["VmcbFields"]


class VmcbFields(Fields):
    """Names with a dot, as cs.base, are written with _ here; items have both: `vmcb["cs.base"]`."""

    __slots__ = ()

    @property
    def intercept_cr_read(self) -> Value:
        """2 bytes at 0x0."""
        return self._get("intercept_cr_read")

    @intercept_cr_read.setter
    def intercept_cr_read(self, value: int) -> None:
        self.write("intercept_cr_read", value)

    @property
    def intercept_cr_write(self) -> Value:
        """2 bytes at 0x2."""
        return self._get("intercept_cr_write")

    @intercept_cr_write.setter
    def intercept_cr_write(self, value: int) -> None:
        self.write("intercept_cr_write", value)

    @property
    def intercept_dr_read(self) -> Value:
        """2 bytes at 0x4."""
        return self._get("intercept_dr_read")

    @intercept_dr_read.setter
    def intercept_dr_read(self, value: int) -> None:
        self.write("intercept_dr_read", value)

    @property
    def intercept_dr_write(self) -> Value:
        """2 bytes at 0x6."""
        return self._get("intercept_dr_write")

    @intercept_dr_write.setter
    def intercept_dr_write(self, value: int) -> None:
        self.write("intercept_dr_write", value)

    @property
    def intercept_exceptions(self) -> Value:
        """4 bytes at 0x8."""
        return self._get("intercept_exceptions")

    @intercept_exceptions.setter
    def intercept_exceptions(self, value: int) -> None:
        self.write("intercept_exceptions", value)

    @property
    def intercept_misc1(self) -> Value:
        """4 bytes at 0xc."""
        return self._get("intercept_misc1")

    @intercept_misc1.setter
    def intercept_misc1(self, value: int) -> None:
        self.write("intercept_misc1", value)

    @property
    def intercept_misc2(self) -> Value:
        """4 bytes at 0x10: VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP, ICEBP, WBINVD, MONITOR, MWAIT."""
        return self._get("intercept_misc2")

    @intercept_misc2.setter
    def intercept_misc2(self, value: int) -> None:
        self.write("intercept_misc2", value)

    @property
    def intercept_misc3(self) -> Value:
        """4 bytes at 0x14: INVLPGB, INVLPGB_ILLEGAL, INVPCID, MCOMMIT, TLBSYNC, BUSLOCK, IDLE_HLT."""
        return self._get("intercept_misc3")

    @intercept_misc3.setter
    def intercept_misc3(self, value: int) -> None:
        self.write("intercept_misc3", value)

    @property
    def pause_filter_threshold(self) -> Value:
        """2 bytes at 0x3c."""
        return self._get("pause_filter_threshold")

    @pause_filter_threshold.setter
    def pause_filter_threshold(self, value: int) -> None:
        self.write("pause_filter_threshold", value)

    @property
    def pause_filter_count(self) -> Value:
        """2 bytes at 0x3e."""
        return self._get("pause_filter_count")

    @pause_filter_count.setter
    def pause_filter_count(self, value: int) -> None:
        self.write("pause_filter_count", value)

    @property
    def iopm_base_pa(self) -> Value:
        """8 bytes at 0x40."""
        return self._get("iopm_base_pa")

    @iopm_base_pa.setter
    def iopm_base_pa(self, value: int) -> None:
        self.write("iopm_base_pa", value)

    @property
    def msrpm_base_pa(self) -> Value:
        """8 bytes at 0x48."""
        return self._get("msrpm_base_pa")

    @msrpm_base_pa.setter
    def msrpm_base_pa(self, value: int) -> None:
        self.write("msrpm_base_pa", value)

    @property
    def tsc_offset(self) -> Value:
        """8 bytes at 0x50."""
        return self._get("tsc_offset")

    @tsc_offset.setter
    def tsc_offset(self, value: int) -> None:
        self.write("tsc_offset", value)

    @property
    def guest_asid(self) -> Value:
        """4 bytes at 0x58."""
        return self._get("guest_asid")

    @guest_asid.setter
    def guest_asid(self, value: int) -> None:
        self.write("guest_asid", value)

    @property
    def tlb_control(self) -> Value:
        """1 byte at 0x5c: action."""
        return self._get("tlb_control")

    @tlb_control.setter
    def tlb_control(self, value: int) -> None:
        self.write("tlb_control", value)

    @property
    def erap_control(self) -> Value:
        """1 byte at 0x5d: allow_larger_rap, clear_rap."""
        return self._get("erap_control")

    @erap_control.setter
    def erap_control(self, value: int) -> None:
        self.write("erap_control", value)

    @property
    def v_intr(self) -> Value:
        """8 bytes at 0x60."""
        return self._get("v_intr")

    @v_intr.setter
    def v_intr(self, value: int) -> None:
        self.write("v_intr", value)

    @property
    def int_state(self) -> Value:
        """8 bytes at 0x68: interrupt_shadow, guest_interrupt_mask."""
        return self._get("int_state")

    @int_state.setter
    def int_state(self, value: int) -> None:
        self.write("int_state", value)

    @property
    def exitcode(self) -> ExitCode | int:
        """8 bytes at 0x70."""
        return self._code("exitcode")

    @exitcode.setter
    def exitcode(self, value: int) -> None:
        self.write("exitcode", value)

    @property
    def exitinfo1(self) -> Value:
        """8 bytes at 0x78."""
        return self._get("exitinfo1")

    @exitinfo1.setter
    def exitinfo1(self, value: int) -> None:
        self.write("exitinfo1", value)

    @property
    def exitinfo2(self) -> Value:
        """8 bytes at 0x80."""
        return self._get("exitinfo2")

    @exitinfo2.setter
    def exitinfo2(self, value: int) -> None:
        self.write("exitinfo2", value)

    @property
    def exitintinfo(self) -> Value:
        """8 bytes at 0x88: vector, type, ev, v, error_code."""
        return self._get("exitintinfo")

    @exitintinfo.setter
    def exitintinfo(self, value: int) -> None:
        self.write("exitintinfo", value)

    @property
    def misc_ctl(self) -> Value:
        """8 bytes at 0x90."""
        return self._get("misc_ctl")

    @misc_ctl.setter
    def misc_ctl(self, value: int) -> None:
        self.write("misc_ctl", value)

    @property
    def avic_apic_bar(self) -> Value:
        """8 bytes at 0x98."""
        return self._get("avic_apic_bar")

    @avic_apic_bar.setter
    def avic_apic_bar(self, value: int) -> None:
        self.write("avic_apic_bar", value)

    @property
    def ghcb_gpa(self) -> Value:
        """8 bytes at 0xa0."""
        return self._get("ghcb_gpa")

    @ghcb_gpa.setter
    def ghcb_gpa(self, value: int) -> None:
        self.write("ghcb_gpa", value)

    @property
    def eventinj(self) -> Value:
        """8 bytes at 0xa8: vector, type, ev, v, error_code."""
        return self._get("eventinj")

    @eventinj.setter
    def eventinj(self, value: int) -> None:
        self.write("eventinj", value)

    @property
    def n_cr3(self) -> Value:
        """8 bytes at 0xb0."""
        return self._get("n_cr3")

    @n_cr3.setter
    def n_cr3(self, value: int) -> None:
        self.write("n_cr3", value)

    @property
    def misc_ctl2(self) -> Value:
        """8 bytes at 0xb8: lbr_virt, v_vmload_vmsave, ibs_virt, pmc_virt."""
        return self._get("misc_ctl2")

    @misc_ctl2.setter
    def misc_ctl2(self, value: int) -> None:
        self.write("misc_ctl2", value)

    @property
    def vmcb_clean(self) -> Value:
        """4 bytes at 0xc0."""
        return self._get("vmcb_clean")

    @vmcb_clean.setter
    def vmcb_clean(self, value: int) -> None:
        self.write("vmcb_clean", value)

    @property
    def nrip(self) -> Value:
        """8 bytes at 0xc8."""
        return self._get("nrip")

    @nrip.setter
    def nrip(self, value: int) -> None:
        self.write("nrip", value)

    @property
    def insn_len(self) -> Value:
        """1 byte at 0xd0."""
        return self._get("insn_len")

    @insn_len.setter
    def insn_len(self, value: int) -> None:
        self.write("insn_len", value)

    @property
    def insn_bytes(self) -> Value:
        """15 bytes at 0xd1."""
        return self._get("insn_bytes")

    @insn_bytes.setter
    def insn_bytes(self, value: int) -> None:
        self.write("insn_bytes", value)

    @property
    def avic_backing_page(self) -> Value:
        """8 bytes at 0xe0."""
        return self._get("avic_backing_page")

    @avic_backing_page.setter
    def avic_backing_page(self, value: int) -> None:
        self.write("avic_backing_page", value)

    @property
    def avic_logical_table(self) -> Value:
        """8 bytes at 0xf0."""
        return self._get("avic_logical_table")

    @avic_logical_table.setter
    def avic_logical_table(self, value: int) -> None:
        self.write("avic_logical_table", value)

    @property
    def avic_physical_table(self) -> Value:
        """8 bytes at 0xf8: max_index, table."""
        return self._get("avic_physical_table")

    @avic_physical_table.setter
    def avic_physical_table(self, value: int) -> None:
        self.write("avic_physical_table", value)

    @property
    def vmsa_pa(self) -> Value:
        """8 bytes at 0x108."""
        return self._get("vmsa_pa")

    @vmsa_pa.setter
    def vmsa_pa(self, value: int) -> None:
        self.write("vmsa_pa", value)

    @property
    def vmgexit_rax(self) -> Value:
        """8 bytes at 0x110."""
        return self._get("vmgexit_rax")

    @vmgexit_rax.setter
    def vmgexit_rax(self, value: int) -> None:
        self.write("vmgexit_rax", value)

    @property
    def vmgexit_cpl(self) -> Value:
        """1 byte at 0x118."""
        return self._get("vmgexit_cpl")

    @vmgexit_cpl.setter
    def vmgexit_cpl(self, value: int) -> None:
        self.write("vmgexit_cpl", value)

    @property
    def bus_lock_counter(self) -> Value:
        """2 bytes at 0x120."""
        return self._get("bus_lock_counter")

    @bus_lock_counter.setter
    def bus_lock_counter(self, value: int) -> None:
        self.write("bus_lock_counter", value)

    @property
    def allowed_sev_features(self) -> Value:
        """8 bytes at 0x138."""
        return self._get("allowed_sev_features")

    @allowed_sev_features.setter
    def allowed_sev_features(self, value: int) -> None:
        self.write("allowed_sev_features", value)

    @property
    def guest_sev_features(self) -> Value:
        """8 bytes at 0x140."""
        return self._get("guest_sev_features")

    @guest_sev_features.setter
    def guest_sev_features(self, value: int) -> None:
        self.write("guest_sev_features", value)

    @property
    def es_selector(self) -> Value:
        """2 bytes at 0x400."""
        return self._get("es.selector")

    @es_selector.setter
    def es_selector(self, value: int) -> None:
        self.write("es.selector", value)

    @property
    def es_attrib(self) -> Value:
        """2 bytes at 0x402: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("es.attrib")

    @es_attrib.setter
    def es_attrib(self, value: int) -> None:
        self.write("es.attrib", value)

    @property
    def es_limit(self) -> Value:
        """4 bytes at 0x404."""
        return self._get("es.limit")

    @es_limit.setter
    def es_limit(self, value: int) -> None:
        self.write("es.limit", value)

    @property
    def es_base(self) -> Value:
        """8 bytes at 0x408."""
        return self._get("es.base")

    @es_base.setter
    def es_base(self, value: int) -> None:
        self.write("es.base", value)

    @property
    def cs_selector(self) -> Value:
        """2 bytes at 0x410."""
        return self._get("cs.selector")

    @cs_selector.setter
    def cs_selector(self, value: int) -> None:
        self.write("cs.selector", value)

    @property
    def cs_attrib(self) -> Value:
        """2 bytes at 0x412: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("cs.attrib")

    @cs_attrib.setter
    def cs_attrib(self, value: int) -> None:
        self.write("cs.attrib", value)

    @property
    def cs_limit(self) -> Value:
        """4 bytes at 0x414."""
        return self._get("cs.limit")

    @cs_limit.setter
    def cs_limit(self, value: int) -> None:
        self.write("cs.limit", value)

    @property
    def cs_base(self) -> Value:
        """8 bytes at 0x418."""
        return self._get("cs.base")

    @cs_base.setter
    def cs_base(self, value: int) -> None:
        self.write("cs.base", value)

    @property
    def ss_selector(self) -> Value:
        """2 bytes at 0x420."""
        return self._get("ss.selector")

    @ss_selector.setter
    def ss_selector(self, value: int) -> None:
        self.write("ss.selector", value)

    @property
    def ss_attrib(self) -> Value:
        """2 bytes at 0x422: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("ss.attrib")

    @ss_attrib.setter
    def ss_attrib(self, value: int) -> None:
        self.write("ss.attrib", value)

    @property
    def ss_limit(self) -> Value:
        """4 bytes at 0x424."""
        return self._get("ss.limit")

    @ss_limit.setter
    def ss_limit(self, value: int) -> None:
        self.write("ss.limit", value)

    @property
    def ss_base(self) -> Value:
        """8 bytes at 0x428."""
        return self._get("ss.base")

    @ss_base.setter
    def ss_base(self, value: int) -> None:
        self.write("ss.base", value)

    @property
    def ds_selector(self) -> Value:
        """2 bytes at 0x430."""
        return self._get("ds.selector")

    @ds_selector.setter
    def ds_selector(self, value: int) -> None:
        self.write("ds.selector", value)

    @property
    def ds_attrib(self) -> Value:
        """2 bytes at 0x432: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("ds.attrib")

    @ds_attrib.setter
    def ds_attrib(self, value: int) -> None:
        self.write("ds.attrib", value)

    @property
    def ds_limit(self) -> Value:
        """4 bytes at 0x434."""
        return self._get("ds.limit")

    @ds_limit.setter
    def ds_limit(self, value: int) -> None:
        self.write("ds.limit", value)

    @property
    def ds_base(self) -> Value:
        """8 bytes at 0x438."""
        return self._get("ds.base")

    @ds_base.setter
    def ds_base(self, value: int) -> None:
        self.write("ds.base", value)

    @property
    def fs_selector(self) -> Value:
        """2 bytes at 0x440."""
        return self._get("fs.selector")

    @fs_selector.setter
    def fs_selector(self, value: int) -> None:
        self.write("fs.selector", value)

    @property
    def fs_attrib(self) -> Value:
        """2 bytes at 0x442: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("fs.attrib")

    @fs_attrib.setter
    def fs_attrib(self, value: int) -> None:
        self.write("fs.attrib", value)

    @property
    def fs_limit(self) -> Value:
        """4 bytes at 0x444."""
        return self._get("fs.limit")

    @fs_limit.setter
    def fs_limit(self, value: int) -> None:
        self.write("fs.limit", value)

    @property
    def fs_base(self) -> Value:
        """8 bytes at 0x448."""
        return self._get("fs.base")

    @fs_base.setter
    def fs_base(self, value: int) -> None:
        self.write("fs.base", value)

    @property
    def gs_selector(self) -> Value:
        """2 bytes at 0x450."""
        return self._get("gs.selector")

    @gs_selector.setter
    def gs_selector(self, value: int) -> None:
        self.write("gs.selector", value)

    @property
    def gs_attrib(self) -> Value:
        """2 bytes at 0x452: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("gs.attrib")

    @gs_attrib.setter
    def gs_attrib(self, value: int) -> None:
        self.write("gs.attrib", value)

    @property
    def gs_limit(self) -> Value:
        """4 bytes at 0x454."""
        return self._get("gs.limit")

    @gs_limit.setter
    def gs_limit(self, value: int) -> None:
        self.write("gs.limit", value)

    @property
    def gs_base(self) -> Value:
        """8 bytes at 0x458."""
        return self._get("gs.base")

    @gs_base.setter
    def gs_base(self, value: int) -> None:
        self.write("gs.base", value)

    @property
    def gdtr_selector(self) -> Value:
        """2 bytes at 0x460."""
        return self._get("gdtr.selector")

    @gdtr_selector.setter
    def gdtr_selector(self, value: int) -> None:
        self.write("gdtr.selector", value)

    @property
    def gdtr_attrib(self) -> Value:
        """2 bytes at 0x462: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("gdtr.attrib")

    @gdtr_attrib.setter
    def gdtr_attrib(self, value: int) -> None:
        self.write("gdtr.attrib", value)

    @property
    def gdtr_limit(self) -> Value:
        """4 bytes at 0x464."""
        return self._get("gdtr.limit")

    @gdtr_limit.setter
    def gdtr_limit(self, value: int) -> None:
        self.write("gdtr.limit", value)

    @property
    def gdtr_base(self) -> Value:
        """8 bytes at 0x468."""
        return self._get("gdtr.base")

    @gdtr_base.setter
    def gdtr_base(self, value: int) -> None:
        self.write("gdtr.base", value)

    @property
    def ldtr_selector(self) -> Value:
        """2 bytes at 0x470."""
        return self._get("ldtr.selector")

    @ldtr_selector.setter
    def ldtr_selector(self, value: int) -> None:
        self.write("ldtr.selector", value)

    @property
    def ldtr_attrib(self) -> Value:
        """2 bytes at 0x472: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("ldtr.attrib")

    @ldtr_attrib.setter
    def ldtr_attrib(self, value: int) -> None:
        self.write("ldtr.attrib", value)

    @property
    def ldtr_limit(self) -> Value:
        """4 bytes at 0x474."""
        return self._get("ldtr.limit")

    @ldtr_limit.setter
    def ldtr_limit(self, value: int) -> None:
        self.write("ldtr.limit", value)

    @property
    def ldtr_base(self) -> Value:
        """8 bytes at 0x478."""
        return self._get("ldtr.base")

    @ldtr_base.setter
    def ldtr_base(self, value: int) -> None:
        self.write("ldtr.base", value)

    @property
    def idtr_selector(self) -> Value:
        """2 bytes at 0x480."""
        return self._get("idtr.selector")

    @idtr_selector.setter
    def idtr_selector(self, value: int) -> None:
        self.write("idtr.selector", value)

    @property
    def idtr_attrib(self) -> Value:
        """2 bytes at 0x482: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("idtr.attrib")

    @idtr_attrib.setter
    def idtr_attrib(self, value: int) -> None:
        self.write("idtr.attrib", value)

    @property
    def idtr_limit(self) -> Value:
        """4 bytes at 0x484."""
        return self._get("idtr.limit")

    @idtr_limit.setter
    def idtr_limit(self, value: int) -> None:
        self.write("idtr.limit", value)

    @property
    def idtr_base(self) -> Value:
        """8 bytes at 0x488."""
        return self._get("idtr.base")

    @idtr_base.setter
    def idtr_base(self, value: int) -> None:
        self.write("idtr.base", value)

    @property
    def tr_selector(self) -> Value:
        """2 bytes at 0x490."""
        return self._get("tr.selector")

    @tr_selector.setter
    def tr_selector(self, value: int) -> None:
        self.write("tr.selector", value)

    @property
    def tr_attrib(self) -> Value:
        """2 bytes at 0x492: TYPE, S, DPL, P, AVL, L, DB, G."""
        return self._get("tr.attrib")

    @tr_attrib.setter
    def tr_attrib(self, value: int) -> None:
        self.write("tr.attrib", value)

    @property
    def tr_limit(self) -> Value:
        """4 bytes at 0x494."""
        return self._get("tr.limit")

    @tr_limit.setter
    def tr_limit(self, value: int) -> None:
        self.write("tr.limit", value)

    @property
    def tr_base(self) -> Value:
        """8 bytes at 0x498."""
        return self._get("tr.base")

    @tr_base.setter
    def tr_base(self, value: int) -> None:
        self.write("tr.base", value)

    @property
    def cpl(self) -> Value:
        """1 byte at 0x4cb."""
        return self._get("cpl")

    @cpl.setter
    def cpl(self, value: int) -> None:
        self.write("cpl", value)

    @property
    def efer(self) -> Value:
        """8 bytes at 0x4d0: SCE, LME, LMA, NXE, SVME, LMSLE, FFXSR, TCE, MCOMMIT, INTWB, UAIE, AIBRSE."""
        return self._get("efer")

    @efer.setter
    def efer(self, value: int) -> None:
        self.write("efer", value)

    @property
    def cr4(self) -> Value:
        """8 bytes at 0x548: VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP."""
        return self._get("cr4")

    @cr4.setter
    def cr4(self, value: int) -> None:
        self.write("cr4", value)

    @property
    def cr3(self) -> Value:
        """8 bytes at 0x550."""
        return self._get("cr3")

    @cr3.setter
    def cr3(self, value: int) -> None:
        self.write("cr3", value)

    @property
    def cr0(self) -> Value:
        """8 bytes at 0x558: PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG."""
        return self._get("cr0")

    @cr0.setter
    def cr0(self, value: int) -> None:
        self.write("cr0", value)

    @property
    def dr7(self) -> Value:
        """8 bytes at 0x560: L0, G0, L1, G1, L2, G2, L3, G3, LE, GE, GD, RW0."""
        return self._get("dr7")

    @dr7.setter
    def dr7(self, value: int) -> None:
        self.write("dr7", value)

    @property
    def dr6(self) -> Value:
        """8 bytes at 0x568: B0, B1, B2, B3, BD, BS, BT."""
        return self._get("dr6")

    @dr6.setter
    def dr6(self, value: int) -> None:
        self.write("dr6", value)

    @property
    def rflags(self) -> Value:
        """8 bytes at 0x570: CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF."""
        return self._get("rflags")

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.write("rflags", value)

    @property
    def rip(self) -> Value:
        """8 bytes at 0x578."""
        return self._get("rip")

    @rip.setter
    def rip(self, value: int) -> None:
        self.write("rip", value)

    @property
    def rsp(self) -> Value:
        """8 bytes at 0x5d8."""
        return self._get("rsp")

    @rsp.setter
    def rsp(self, value: int) -> None:
        self.write("rsp", value)

    @property
    def s_cet(self) -> Value:
        """8 bytes at 0x5e0."""
        return self._get("s_cet")

    @s_cet.setter
    def s_cet(self, value: int) -> None:
        self.write("s_cet", value)

    @property
    def ssp(self) -> Value:
        """8 bytes at 0x5e8."""
        return self._get("ssp")

    @ssp.setter
    def ssp(self, value: int) -> None:
        self.write("ssp", value)

    @property
    def isst_addr(self) -> Value:
        """8 bytes at 0x5f0."""
        return self._get("isst_addr")

    @isst_addr.setter
    def isst_addr(self, value: int) -> None:
        self.write("isst_addr", value)

    @property
    def rax(self) -> Value:
        """8 bytes at 0x5f8."""
        return self._get("rax")

    @rax.setter
    def rax(self, value: int) -> None:
        self.write("rax", value)

    @property
    def star(self) -> Value:
        """8 bytes at 0x600."""
        return self._get("star")

    @star.setter
    def star(self, value: int) -> None:
        self.write("star", value)

    @property
    def lstar(self) -> Value:
        """8 bytes at 0x608."""
        return self._get("lstar")

    @lstar.setter
    def lstar(self, value: int) -> None:
        self.write("lstar", value)

    @property
    def cstar(self) -> Value:
        """8 bytes at 0x610."""
        return self._get("cstar")

    @cstar.setter
    def cstar(self, value: int) -> None:
        self.write("cstar", value)

    @property
    def sfmask(self) -> Value:
        """8 bytes at 0x618: CF, PF, AF, ZF, SF, TF, IF, DF, OF, IOPL, NT, RF."""
        return self._get("sfmask")

    @sfmask.setter
    def sfmask(self, value: int) -> None:
        self.write("sfmask", value)

    @property
    def kernel_gs_base(self) -> Value:
        """8 bytes at 0x620."""
        return self._get("kernel_gs_base")

    @kernel_gs_base.setter
    def kernel_gs_base(self, value: int) -> None:
        self.write("kernel_gs_base", value)

    @property
    def sysenter_cs(self) -> Value:
        """8 bytes at 0x628."""
        return self._get("sysenter_cs")

    @sysenter_cs.setter
    def sysenter_cs(self, value: int) -> None:
        self.write("sysenter_cs", value)

    @property
    def sysenter_esp(self) -> Value:
        """8 bytes at 0x630."""
        return self._get("sysenter_esp")

    @sysenter_esp.setter
    def sysenter_esp(self, value: int) -> None:
        self.write("sysenter_esp", value)

    @property
    def sysenter_eip(self) -> Value:
        """8 bytes at 0x638."""
        return self._get("sysenter_eip")

    @sysenter_eip.setter
    def sysenter_eip(self, value: int) -> None:
        self.write("sysenter_eip", value)

    @property
    def cr2(self) -> Value:
        """8 bytes at 0x640."""
        return self._get("cr2")

    @cr2.setter
    def cr2(self, value: int) -> None:
        self.write("cr2", value)

    @property
    def g_pat(self) -> Value:
        """8 bytes at 0x668."""
        return self._get("g_pat")

    @g_pat.setter
    def g_pat(self, value: int) -> None:
        self.write("g_pat", value)

    @property
    def dbgctl(self) -> Value:
        """8 bytes at 0x670: LBR, BTF, PB0, PB1, PB2, PB3."""
        return self._get("dbgctl")

    @dbgctl.setter
    def dbgctl(self, value: int) -> None:
        self.write("dbgctl", value)

    @property
    def br_from(self) -> Value:
        """8 bytes at 0x678."""
        return self._get("br_from")

    @br_from.setter
    def br_from(self, value: int) -> None:
        self.write("br_from", value)

    @property
    def br_to(self) -> Value:
        """8 bytes at 0x680."""
        return self._get("br_to")

    @br_to.setter
    def br_to(self, value: int) -> None:
        self.write("br_to", value)

    @property
    def last_excp_from(self) -> Value:
        """8 bytes at 0x688."""
        return self._get("last_excp_from")

    @last_excp_from.setter
    def last_excp_from(self, value: int) -> None:
        self.write("last_excp_from", value)

    @property
    def last_excp_to(self) -> Value:
        """8 bytes at 0x690."""
        return self._get("last_excp_to")

    @last_excp_to.setter
    def last_excp_to(self, value: int) -> None:
        self.write("last_excp_to", value)

    @property
    def spec_ctrl(self) -> Value:
        """8 bytes at 0x6e0."""
        return self._get("spec_ctrl")

    @spec_ctrl.setter
    def spec_ctrl(self, value: int) -> None:
        self.write("spec_ctrl", value)
