# SPDX-License-Identifier: GPL-2.0-or-later
# ruff: noqa: E501
"""Every command of the registry as a method, with its parameters and the type of its result.

Made by `python -m tests.reference`: change the commands, not this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal

from introspect.commands import Result
from introspect.commands.avic import Avic
from introspect.commands.backtrace import Backtrace
from introspect.commands.binding import Numbered
from introspect.commands.cpuid import Cpuid
from introspect.commands.descriptors import Table, TaskState, Vectors
from introspect.commands.disassemble import Disassembly
from introspect.commands.examine import Examined, Stack, Value
from introspect.commands.exits import Exits, Histogram
from introspect.commands.exits import Written as ExitsWritten
from introspect.commands.expectation import Held
from introspect.commands.files import Moved, SavedCore
from introspect.commands.guests import Guests
from introspect.commands.help import Help
from introspect.commands.iommu import DeviceList, State, WalkedIo
from introspect.commands.iommu_interrupts import InterruptTable
from introspect.commands.iommu_logs import CommandsList, Events, GuestInterrupts, Requests
from introspect.commands.iommu_reach import Map, Pasids, Tlb
from introspect.commands.leaks import Leaks
from introspect.commands.mappers import Audit, WhoMaps
from introspect.commands.msr import Msrs as MsrMsrs
from introspect.commands.permissions import Msrs as PermissionsMsrs
from introspect.commands.permissions import Ports
from introspect.commands.registers import Registers
from introspect.commands.scan import Scanned
from introspect.commands.search import Matches
from introspect.commands.situation import Situation, Where
from introspect.commands.skinit import Verdict
from introspect.commands.symbols import Found
from introspect.commands.tables import Space
from introspect.commands.tables import Written as TablesWritten
from introspect.commands.vmcb import Intercepts, Rules, VmcbView, Why
from introspect.commands.walk import Walked
from introspect.commands.why_no_irq import Chain
from introspect.commands.would_exit import Predicted
from vmdbg.api.results import Stopped
from vmdbg.catching import Listing, Set
from vmdbg.console.run_commands import Points
from vmdbg.fingerprint_commands import FingerprintView
from vmdbg.late_launch_commands import DevView, LaunchView, LogView, PcrView
from vmdbg.pci_commands import Decoded, Interrupt, Transaction, Tree
from vmdbg.platform_commands import Devices, MapView
from vmdbg.results import Text
from vmdbg.switch_commands import CleanBits, TlbAudit, VmcbDiff
from vmdbg.timetravel.commands import Kept, Moments, Restored, Taken

__all__ = ["RESULTS", "Commands", "InferiorCommands", "MachineCommands"]

Who = int | str | Numbered
"""An inferior: its number, its name, or the object."""


class _Called(ABC):
    @abstractmethod
    def _call(self, name: str, values: Mapping[str, object], words: tuple[object, ...]) -> Result: ...


class _Everywhere(_Called):
    """Some of the commands."""

    def arch(self, *words: object) -> Text:
        """Choose the registers of an inferior.

        Needed where its mode is another one when gdb attaches than when it is debugged. gdb reads it
        when it attaches; for process 1, `disconnect` and connect again: nothing runs meanwhile.
          arch 2 i386:x86-64

        Words as in the command language: `arch PID i386:x86-64|i386|i8086`.
        """
        found = self._call("arch", {}, words)
        assert isinstance(found, Text)
        return found

    def audit_isolation(self, *, fail_at: Literal['low', 'medium', 'high', 'critical'] | None = None) -> Audit:
        """Find where guests are not kept apart, or reach what confines them.

        Critical: an agent writes a VMCB, permission map, save area, nested table, table of an IOMMU or the hypervisor's
        image, or a guest's user code reaches them. High: it reads them; two agents write the same page; the host's user code
        reaches them; a guest's device sends interrupts that no table decides. Medium: one agent reads what another writes;
        pages of the host are writable and executable. Low: the same in a guest. Agents are guests and devices. A device
        reaches what IOMMU, DEV and SKINIT's protection all let pass, and belongs to the guest whose RAM the IOMMU's tables
        map most of. A guest that runs within another shares that one's memory by design. The exit status of `vmdbg inspect`
        is 1 if there are findings.

        fail_at: the exit status is 1 from such findings on (medium)
        """
        found = self._call("audit isolation", {"fail_at": fail_at}, ())
        assert isinstance(found, Audit)
        return found

    def avic(self, guest: Who | None = None) -> Avic:
        """Show a virtual APIC: its registers, what is requested and in service, and AVIC's two tables.

        PA is the address of a VMCB: a guest with several has one APIC for each, and `guests` lists them. Registers that
        are zero are left out.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("avic", {"guest": guest}, ())
        assert isinstance(found, Avic)
        return found

    def break_(self, address: int | str, condition: str | None = None) -> Text:
        """Stop at an address.

        Of the selected inferior unless the address names another: host:main, 2:work. One of a guest that is not there yet
        waits for it. With `if`, only where the expression is not 0 then (see `help catch` for what it can ask for).

        condition: an expression that must not be 0 then
        """
        found = self._call("break", {"address": address, "condition": condition}, ())
        assert isinstance(found, Text)
        return found

    def break_range(self, *words: object) -> Text:
        """Stop at every instruction within START <= address < END; or list, or delete.

          break-range 0x101000 0x101200
          break-range 2:0xffffffff80100000 0xffffffff80101000

        Words as in the command language: `break-range [[GUEST:]START END] | break-range delete N`.
        """
        found = self._call("break-range", {}, words)
        assert isinstance(found, Text)
        return found

    def bt(self, frames: int | None = None, guest: Who | None = None) -> Backtrace:
        """Show the frames of the stack: who called whom.

        By the call frame information (.debug_frame, .eh_frame) of the inferior's symbol file where that has any, else by
        frame pointers. Says how each frame was found and where knowledge ends. A first number is N; name a guest with --guest.

        frames: how many frames at most (64)
        guest: whose; else who is selected
        """
        found = self._call("bt", {"frames": frames, "guest": guest}, ())
        assert isinstance(found, Backtrace)
        return found

    def clean_bits_check(self, guest: Who | None = None) -> CleanBits:
        """Find fields that were changed without clearing their VMCB clean bit.

        At the VMRUNs that are kept (`vmcb record`), and if VMRUN came now. With `vmdbg run --vmcb-cache strict` a CPU
        uses what it remembers of a VMCB; then the answer is what it remembers.

        guest: all of them if none is named
        """
        found = self._call("clean-bits check", {"guest": guest}, ())
        assert isinstance(found, CleanBits)
        return found

    def continue_(self, ticks: int | None = None) -> Stopped:
        """Run until something stops it, or for some ticks of guest time.

        ^C stops it. While it runs, everything that only reads can be asked.

        ticks: ticks to run at most; without, until something stops it
        """
        found = self._call("continue", {"ticks": ticks}, ())
        assert isinstance(found, Stopped)
        return found

    def cpuid(self, leaf: int | None = None, subleaf: int | None = None, guest: Who | None = None) -> Cpuid:
        """Show what CPUID returns, features by name.

        Says whether the guest's hypervisor intercepts it. Numbers in front are LEAF and SUBLEAF: name a guest with --guest.

        leaf: EAX; without it all leaves that are not 0
        subleaf: ECX; without it all that are worth asking for
        guest: whose; else who is selected
        """
        found = self._call("cpuid", {"leaf": leaf, "subleaf": subleaf, "guest": guest}, ())
        assert isinstance(found, Cpuid)
        return found

    def debug(self, *words: object) -> Text:
        """Choose the inferiors that stop, or list them.

        The others run through, breakpoints, watchpoints and all; a step of theirs that is asked for is made.
          debug guest 2,3  only guests 2 and 3 stop
          debug host,2     the hypervisor, and guest 2
          debug all        whatever gdb resumes (default)

        Words as in the command language: `debug [all | host | [guest] N[,N...]]`.
        """
        found = self._call("debug", {}, words)
        assert isinstance(found, Text)
        return found

    def delete(self, n: int | None = None) -> Points:
        """Delete a breakpoint, or all.

        Watchpoints and catchpoints are deleted by `watch delete N` and `catch delete N`.
        """
        found = self._call("delete", {"n": n}, ())
        assert isinstance(found, Points)
        return found

    def dev(self, bdf: int | str | None = None) -> DevView:
        """Show the device exclusion vector: registers, domains, what they deny.

        `dma try` says what it makes of one access; `audit isolation` and `who-maps` know it, too.

        bdf: only the domain of this device
        """
        found = self._call("dev", {"bdf": bdf}, ())
        assert isinstance(found, DevView)
        return found

    def devices(self, name: int | str | None = None) -> Devices:
        """List the devices, or show what one holds now.

        Nothing changes: no register is read as software would read it.

        name: this one, with what it holds now
        """
        found = self._call("devices", {"name": name}, ())
        assert isinstance(found, Devices)
        return found

    def disable(self, n: int | None = None) -> Points:
        """Let a breakpoint, or all, pass."""
        found = self._call("disable", {"n": n}, ())
        assert isinstance(found, Points)
        return found

    def disasm(self, address: int | str | None = None, count: int | None = None, guest: Who | None = None) -> Disassembly:
        """Disassemble code in the inferior's mode: names, and what its hypervisor intercepts.

        Without ADDRESS around the current instruction, which => marks. A first number is the address: to name a guest write
        2:rip, or --guest 2. # names what an operand means, ! the #VMEXIT by which the instruction would leave its guest, or
        the exception it would raise: for the current one with the registers as they are. `would-exit` says why.

        address: where to begin; else around the current instruction
        count: how many instructions (12)
        guest: whose; else who is selected
        """
        found = self._call("disasm", {"address": address, "count": count, "guest": guest}, ())
        assert isinstance(found, Disassembly)
        return found

    def dma(
        self,
        bdf: int | str,
        address: int | str,
        length: int,
        access: Literal['r', 'w'],
        data: int | str | None = None,
        *,
        pasid: int | None = None,
        supervisor: bool = False,
        translated: bool = False,
    ) -> Transaction:
        """Read or write as a device would: any requester, any address.

        It happens now, with all that follows from it: a write of four bytes to 0xfeexxxxx is an interrupt
        message, watchpoints see it. Whether a device may master the bus does not matter.

        bdf: who: any bus:device.function, a device there or not
        address: as the device has it: an IOMMU would translate it
        length: bytes
        data: for w: bytes in hexadecimal, repeated to LENGTH
        pasid: the request has one
        supervisor: with a PASID: as supervisor
        translated: as if it had translated the address itself (ATS)
        """
        found = self._call(
            "dma",
            {
                "bdf": bdf,
                "address": address,
                "length": length,
                "access": access,
                "data": data,
                "pasid": pasid,
                "supervisor": supervisor,
                "translated": translated,
            },
            (),
        )
        assert isinstance(found, Transaction)
        return found

    def dma_try(
        self,
        bdf: int | str,
        address: int | str,
        length: int,
        access: Literal['r', 'w'],
        *,
        pasid: int | None = None,
        supervisor: bool = False,
        translated: bool = False,
    ) -> Transaction:
        """Say where a device's access would lead, without a side effect.

        Whether a device may master the bus does not matter. Behind an IOMMU, the entries that decide are shown.

        bdf: who: any bus:device.function, a device there or not
        address: as the device has it: an IOMMU would translate it
        length: bytes
        pasid: the request has one
        supervisor: with a PASID: as supervisor
        translated: as if it had translated the address itself (ATS)
        """
        found = self._call(
            "dma try",
            {
                "bdf": bdf,
                "address": address,
                "length": length,
                "access": access,
                "pasid": pasid,
                "supervisor": supervisor,
                "translated": translated,
            },
            (),
        )
        assert isinstance(found, Transaction)
        return found

    def dump(self, file: str | PathLike[str], address: int | str, length: int | str, *, holes: bool = False) -> Moved:
        """Write a stretch of memory to a file, as it is.

        The address is linear unless it names another space. Where a part of it is not mapped, nothing is written unless
        --holes asks for zeros.

        holes: write zeros for what cannot be read
        """
        found = self._call("dump", {"file": file, "address": address, "length": length, "holes": holes}, ())
        assert isinstance(found, Moved)
        return found

    def enable(self, n: int | None = None) -> Points:
        """Let a disabled breakpoint stop again, or all."""
        found = self._call("enable", {"n": n}, ())
        assert isinstance(found, Points)
        return found

    def expect(self, expression: str) -> Held:
        """Fail if an expression is 0: what a script expects.

        Expressions are those of `print`. A script of `vmdbg test` ends there, gdb's has an error, `vmdbg console -x` a status.
        """
        found = self._call("expect", {"expression": expression}, ())
        assert isinstance(found, Held)
        return found

    def fingerprint(self, count: int | None = None) -> FingerprintView:
        """Show what run this is, and the hash of all that it has done so far.

        Two runs of one identity that stand at the same tick have the same trace, whoever looks on and however often they
        were stopped. What a debugger changes is part of the identity. `vmdbg run --fingerprint` makes a trace.

        count: show the last so many checkpoints, too
        """
        found = self._call("fingerprint", {"count": count}, ())
        assert isinstance(found, FingerprintView)
        return found

    def follow(self, *words: object) -> Text:
        """Choose where a step of a guest ends that leaves it.

          follow guest  at the guest's next instruction: the hypervisor runs meanwhile (default)
          follow host   at the hypervisor's first instruction behind VMRUN

        Words as in the command language: `follow [guest|host]`.
        """
        found = self._call("follow", {}, words)
        assert isinstance(found, Text)
        return found

    def gdt(self, guest: Who | None = None) -> Table:
        """Show the global descriptor table: types, DPL, bases, limits, gates.

        Null descriptors are left out. Behind each the segment registers that hold its selector.

        guest: whose; else who is selected
        """
        found = self._call("gdt", {"guest": guest}, ())
        assert isinstance(found, Table)
        return found

    def help(self, command: int | str | None = None) -> Help:
        """List the commands, or explain one."""
        found = self._call("help", {"command": command}, ())
        assert isinstance(found, Help)
        return found

    def here(self, guest: Who | None = None) -> Where:
        """Say in one line where an inferior is: mode, CPL, ASID, CR3, nCR3, RIP, last exit.

        guest: whose; else the selected one's
        """
        found = self._call("here", {"guest": guest}, ())
        assert isinstance(found, Where)
        return found

    def idt(self, guest: Who | None = None, *, vector: int | None = None) -> Vectors:
        """Show the interrupt descriptor table, or real mode's vectors: gates and where they lead.

        Vectors that are zero are left out, and those that differ in nothing but a handler at equal distances are one line.

        guest: whose; else who is selected
        vector: this one only
        """
        found = self._call("idt", {"guest": guest, "vector": vector}, ())
        assert isinstance(found, Vectors)
        return found

    def intercepts(self, guest: Who | None = None) -> Intercepts:
        """List what a guest's VMCB intercepts.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("intercepts", {"guest": guest}, ())
        assert isinstance(found, Intercepts)
        return found

    def interrupt(self) -> Stopped | Text:
        """Stop the machine where it is, as ^C does."""
        found = self._call("interrupt", {}, ())
        assert isinstance(found, Stopped | Text)
        return found

    def ioapic(self) -> Devices:
        """Show what the I/O APIC holds now.

        The same as `devices ioapic`.
        """
        found = self._call("ioapic", {}, ())
        assert isinstance(found, Devices)
        return found

    def iommu(
        self,
        *,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
    ) -> State:
        """Show the IOMMUs: what is on, features, device table, rings.

        Head and tail are in bytes. Without an IOMMU, as in most dumps, name where a device table is: --base.

        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        """
        found = self._call("iommu", {"base": base, "entries": entries, "irte": irte}, ())
        assert isinstance(found, State)
        return found

    def iommu_commands(
        self,
        count: int | None = None,
        *,
        ring: int | str | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
    ) -> CommandsList:
        """List the command buffer, decoded: what is waiting, and what was done last.

        `new` are those from head to tail, which the IOMMU has still to carry out; `old` ones it has.

        count: so many of the last (16)
        ring: where the ring is, if no register says so, as in a dump: its first N records
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        """
        found = self._call("iommu commands", {"count": count, "ring": ring, "base": base, "entries": entries, "irte": irte}, ())
        assert isinstance(found, CommandsList)
        return found

    def iommu_devices(
        self,
        *,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        limit: int | None = None,
    ) -> DeviceList:
        """List the device table: domain, tables, interrupts and owner of each device.

        Every entry with V or IV, neighbours that are the same as one line. Interrupts: `any` (IV is 0), `none`, `any fixed`,
        or how many entries its table has and where, with the types that pass besides. Rights: ATS (I) and PRI (PPR) are what
        the device may ask for. The owner is the guest whose RAM the tables map most of. Lines with ! have entries that the
        IOMMU refuses.

        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        limit: so many lines at most (256); 0 for all
        """
        found = self._call("iommu devices", {"base": base, "entries": entries, "irte": irte, "limit": limit}, ())
        assert isinstance(found, DeviceList)
        return found

    def iommu_events(
        self,
        count: int | None = None,
        *,
        ring: int | str | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        explain: bool = False,
    ) -> Events:
        """List the event log, decoded; replayed to the entry that refused.

        `new` are those that software has not read yet (from head to tail); `old` ones are those before, as far as they are
        still there. A replay reads the tables as they are now, and says so where they have changed.

        count: so many of the last (16)
        ring: where the ring is, if no register says so, as in a dump: its first N records
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        explain: replay each to the entry that refused
        """
        found = self._call(
            "iommu events",
            {"count": count, "ring": ring, "base": base, "entries": entries, "irte": irte, "explain": explain},
            (),
        )
        assert isinstance(found, Events)
        return found

    def iommu_ga_log(
        self,
        count: int | None = None,
        *,
        ring: int | str | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
    ) -> GuestInterrupts:
        """List the guest virtual APIC log, decoded: interrupts of guests that did not run.

        `new` and `old` as for `iommu events`. GATag is what the hypervisor has in the entry of the interrupt table, and finds
        its vCPU by.

        count: so many of the last (16)
        ring: where the ring is, if no register says so, as in a dump: its first N records
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        """
        found = self._call("iommu ga-log", {"count": count, "ring": ring, "base": base, "entries": entries, "irte": irte}, ())
        assert isinstance(found, GuestInterrupts)
        return found

    def iommu_irt(
        self,
        bdf: int | str,
        *,
        limit: int | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        all: bool = False,
    ) -> InterruptTable:
        """List the interrupt remapping table of a device.

        An entry with GuestMode leads to the virtual APIC of a guest, which is named where it is known.

        bdf: a device: bus:device.function, as 00:03.0, there or not
        limit: so many entries at most (64); 0 for all
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        all: entries without RemapEn, too, unless they are 0
        """
        found = self._call(
            "iommu irt",
            {"bdf": bdf, "limit": limit, "base": base, "entries": entries, "irte": irte, "all": all},
            (),
        )
        assert isinstance(found, InterruptTable)
        return found

    def iommu_map(
        self,
        bdf: int | str,
        *,
        pasid: int | None = None,
        limit: int | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        linear: bool = False,
    ) -> Map:
        """List everything that a device or a domain reaches, with the guests' RAM that it ends in.

        Neighbours with the same rights are one range, whatever their page sizes; where there are guests, only those that lead
        on linearly, or go on in a guest's RAM (scattered). Left out are the interrupt range, special addresses that the entry
        does not have translated, what a DEV denies the device, and a block that SKINIT protects.

        pasid: the addresses of this PASID
        limit: so many lines at most (256); 0 for all
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        linear: a new range also where it does not lead on linearly
        """
        found = self._call(
            "iommu map",
            {"bdf": bdf, "pasid": pasid, "limit": limit, "base": base, "entries": entries, "irte": irte, "linear": linear},
            (),
        )
        assert isinstance(found, Map)
        return found

    def iommu_pasids(
        self,
        bdf: int | str,
        *,
        limit: int | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
    ) -> Pasids:
        """List the PASIDs of a device that have tables, and where these are.

        `iommu map BDF --pasid N` lists what one of them reaches, `iommu walk BDF IOVA --pasid N` shows the way of an address.

        bdf: a device: bus:device.function, as 00:03.0, there or not
        limit: so many lines at most (256); 0 for all
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        """
        found = self._call("iommu pasids", {"bdf": bdf, "limit": limit, "base": base, "entries": entries, "irte": irte}, ())
        assert isinstance(found, Pasids)
        return found

    def iommu_requests(
        self,
        count: int | None = None,
        *,
        ring: int | str | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        explain: bool = False,
    ) -> Requests:
        """List the log of devices' page requests, decoded; with what the tables have there now.

        `new` and `old` as for `iommu events`. PPRTag is the group, which COMPLETE_PPR_REQUEST answers, and in bit 9 whether
        this is the last of it. `devices edu-00:03.0` says which of them a device still waits for.

        count: so many of the last (16)
        ring: where the ring is, if no register says so, as in a dump: its first N records
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        explain: replay each to the entry that refused
        """
        found = self._call(
            "iommu requests",
            {"count": count, "ring": ring, "base": base, "entries": entries, "irte": irte, "explain": explain},
            (),
        )
        assert isinstance(found, Requests)
        return found

    def iommu_tlb(self, *, limit: int | None = None) -> Tlb:
        """List what the IOMMUs keep of their tables, and what of it is stale.

        Translations, and with `--iommu-cache strict` entries of device tables, interrupt tables and page directories. Without
        that an IOMMU keeps nothing that its tables do not say any more; devices with ATS do. What is stale is an invalidation
        that is still due, or was forgotten; `stop-on stale` stops where it is used.

        limit: so many lines at most (256); 0 for all
        """
        found = self._call("iommu tlb", {"limit": limit}, ())
        assert isinstance(found, Tlb)
        return found

    def iommu_walk(
        self,
        bdf: int | str,
        iova: int | str,
        *,
        pasid: int | None = None,
        base: int | str | None = None,
        entries: int | None = None,
        irte: Literal['32', '128'] | None = None,
        access: Literal['r', 'w', 'x'] | None = None,
        supervisor: bool = False,
    ) -> WalkedIo:
        """Translate an address of a device: every entry, skipped levels, rights, verdict or event.

        Nothing changes, neither accessed and dirty bits nor the log. Entries L1 to L6 are of the host's tables; GCR3 and
        PML4E ... PTE those of a PASID, whose own addresses the host's tables translate in turn.

        bdf: a device: bus:device.function, as 00:03.0, there or not
        iova: as the device has it
        pasid: of a request that has one
        base: where a device table is: of an IOMMU whose registers are not known, as in a dump
        entries: with --base: how many devices the table has (65536)
        irte: with --base: the size of interrupt table entries (128)
        access: read, write, or with a PASID execute (r)
        supervisor: with a PASID: as supervisor
        """
        found = self._call(
            "iommu walk",
            {
                "bdf": bdf,
                "iova": iova,
                "pasid": pasid,
                "base": base,
                "entries": entries,
                "irte": irte,
                "access": access,
                "supervisor": supervisor,
            },
            (),
        )
        assert isinstance(found, WalkedIo)
        return found

    def iopm(self, guest: Who | None = None) -> Ports:
        """List the ports that a guest's I/O permission map intercepts.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("iopm", {"guest": guest}, ())
        assert isinstance(found, Ports)
        return found

    def irq_try(self, bdf: int | str, address: int | str, data: int) -> Interrupt:
        """Say which interrupt a device's message would be, without a side effect.

        A message is a write of four bytes to 0xfeexxxxx; an IOMMU may make another of it.

        bdf: who: any bus:device.function, a device there or not
        address: as the device has it: an IOMMU would translate it
        data: what is written
        """
        found = self._call("irq try", {"bdf": bdf, "address": address, "data": data}, ())
        assert isinstance(found, Interrupt)
        return found

    def lapic(self, cpu: int | None = None) -> Devices:
        """Show the local APICs: mode, priorities, vectors requested and in service, LVT, timer.

        Nothing changes: no register is read as software would read it. A guest's virtual APIC is shown by `avic`.

        cpu: of this CPU; else of each
        """
        found = self._call("lapic", {"cpu": cpu}, ())
        assert isinstance(found, Devices)
        return found

    def ldt(self, guest: Who | None = None) -> Table:
        """Show the local descriptor table, where there is one.

        Selectors have bit 2 set: they name the LDT.

        guest: whose; else who is selected
        """
        found = self._call("ldt", {"guest": guest}, ())
        assert isinstance(found, Table)
        return found

    def leak_check(self, guest: Who | None = None) -> Leaks:
        """Find state that VMRUN does not switch and the hypervisor forgot: DR0-3, XMM, STAR, PAT ...

        seen: at a VMRUN a register held what another guest, or the host, had left there; `leak record on` has the machine
        look. possible: the VMCB lets the guest at such state without a #VMEXIT; whether the hypervisor switches it all the
        same only a run can tell.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("leak check", {"guest": guest}, ())
        assert isinstance(found, Leaks)
        return found

    def leak_record(self, switch: Literal['on', 'off'] | None = None) -> Text:
        """Look at each world switch for what VMRUN does not switch, or no more.

        Some thirty times slower meanwhile: world switches are made in Python. `leak check` tells what was seen.
        """
        found = self._call("leak record", {"switch": switch}, ())
        assert isinstance(found, Text)
        return found

    def load(self, file: str | PathLike[str], address: int | str) -> Moved:
        """Write a file into memory, past all rights.

        The address is linear unless it names another space. All of it must be mapped, or nothing is written. A dump cannot be
        changed.
        """
        found = self._call("load", {"file": file, "address": address}, ())
        assert isinstance(found, Moved)
        return found

    def msr(self, msr: int | str | None = None, guest: Who | None = None) -> MsrMsrs:
        """Read model-specific registers by number or name, without side effects.

        As the inferior's own RDMSR would find them if its hypervisor let it; ! marks accesses that its MSR permission map
        intercepts. A guest that is not on a processor has what its VMCB keeps, and what world switches leave alone.

        msr: this one only; else all that are known and not 0
        guest: whose; else who is selected
        """
        found = self._call("msr", {"msr": msr, "guest": guest}, ())
        assert isinstance(found, MsrMsrs)
        return found

    def msrpm(self, guest: Who | None = None) -> PermissionsMsrs:
        """List the MSRs that a guest's MSR permission map intercepts.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("msrpm", {"guest": guest}, ())
        assert isinstance(found, PermissionsMsrs)
        return found

    def mtree(self) -> MapView:
        """Show the physical memory map, RAM, devices and their owners, and the ports.

        Of the machine, that is of the hypervisor; what a guest has instead is in its nested page tables: `npt`.
        """
        found = self._call("mtree", {}, ())
        assert isinstance(found, MapView)
        return found

    def nexti(self, n: int | None = None) -> Stopped:
        """The same, over calls.

        n: how many (1)
        """
        found = self._call("nexti", {"n": n}, ())
        assert isinstance(found, Stopped)
        return found

    def npt(
        self,
        guest: Who | None = None,
        *,
        limit: int | None = None,
        map: str | PathLike[str] | None = None,
        linear: bool = False,
    ) -> Space | TablesWritten:
        """List everything that a guest's nested page tables map, as ranges; or draw it.

        Neighbours with the same rights and memory type are one range, whatever their page sizes. The type is the one of the
        host's PAT; `walk` takes the MTRRs in, too. Lines with ! tell of tables that are not in order, those with ? of what
        could not be looked at.

        guest: whose; else the selected guest's
        limit: so many ranges at most (256); 0 for all
        map: draw it instead: a picture (SVG, or HTML by the file's name) of what maps where
        linear: a new range also where it does not lead on linearly
        """
        found = self._call("npt", {"guest": guest, "limit": limit, "map": map, "linear": linear}, ())
        assert isinstance(found, Space | TablesWritten)
        return found

    def pci(self, bdf: int | str | None = None) -> Decoded | Tree:
        """Show the functions on PCI, or one with its registers and capabilities.

        BARs in parentheses do not answer: the command register or the power state keeps them off.

        bdf: this function in full: bus:device.function, as 00:03.0
        """
        found = self._call("pci", {"bdf": bdf}, ())
        assert isinstance(found, Decoded | Tree)
        return found

    def pic(self) -> Devices:
        """Show what the 8259A interrupt controllers hold now.

        The same as `devices pic`.
        """
        found = self._call("pic", {}, ())
        assert isinstance(found, Devices)
        return found

    def pit(self) -> Devices:
        """Show what the 8254 interval timer holds now.

        The same as `devices pit`.
        """
        found = self._call("pit", {}, ())
        assert isinstance(found, Devices)
        return found

    def points(self) -> Points:
        """List the breakpoints of the console."""
        found = self._call("points", {}, ())
        assert isinstance(found, Points)
        return found

    def print(self, expression: str, format: str | None = None) -> Value:
        """Evaluate an expression: decimal, hexadecimal, and the symbol that an address belongs to.

        Names are registers, VMCB fields (vmcb.rip), exit codes and symbols, whose value is their address; u8 to u64[...] read
        memory; host: and 2: before a name mean another inferior's.

        format: one of x d u o t z c a, as gdb's print
        """
        found = self._call("print", {"expression": expression, "format": format}, ())
        assert isinstance(found, Value)
        return found

    def pt(self, guest: Who | None = None, *, limit: int | None = None, linear: bool = False) -> Space:
        """List everything that page tables map, as ranges; a guest's combined with its nested ones.

        The rights are those that both dimensions grant together. What the guest's tables map and the nested ones do not is
        listed apart. The type is what the PATs make of it; `walk` takes the MTRRs in, too.

        guest: whose; else who is selected
        limit: so many ranges at most (256); 0 for all
        linear: a new range also where it does not lead on linearly
        """
        found = self._call("pt", {"guest": guest, "limit": limit, "linear": linear}, ())
        assert isinstance(found, Space)
        return found

    def regs(self, group: Literal['general', 'system', 'svm', 'all'] | None = None, guest: Who | None = None) -> Registers:
        """Show the registers of the hypervisor or a guest by groups, flags by name.

        general: the general registers, segments and control registers; system: segments, CR, DR and MSRs; svm: the control
        area of the VMCB as it is in memory, and GIF (of the hypervisor, of the VMCB that its CPU ran last).
        * marks what has another value than at the last resume; from the second `regs` on.
        gdb has them all as $exitcode, $asid, $star ...; lldb shows them by group (register read --all).

        group: general (the default), system, svm or all
        guest: whose; else who is selected
        """
        found = self._call("regs", {"group": group, "guest": guest}, ())
        assert isinstance(found, Registers)
        return found

    def rtc(self) -> Devices:
        """Show what the real-time clock and CMOS memory holds now.

        The same as `devices rtc`.
        """
        found = self._call("rtc", {}, ())
        assert isinstance(found, Devices)
        return found

    def rules(self) -> Rules:
        """List the consistency rules of VMRUN."""
        found = self._call("rules", {}, ())
        assert isinstance(found, Rules)
        return found

    def save_core(self, file: str | PathLike[str], guest: Who | None = None) -> SavedCore:
        """Write an ELF core of the machine, or of one guest, that gdb, drgn and Volatility open.

        Without GUEST the machine as its hypervisor sees it. p_paddr is the physical address, for a guest the guest-physical
        one; p_vaddr is the linear one by the page tables, or 0x4000000000000000 above the physical one where they map
        nothing. Each processor is a thread. A Linux kernel's VMCOREINFO is looked for in memory. `vmdbg inspect FILE` opens
        the core with all that is known of the guests. Zeros become holes of a sparse file.

        guest: whose core: a guest's, or the machine's (host)
        """
        found = self._call("save core", {"file": file, "guest": guest}, ())
        assert isinstance(found, SavedCore)
        return found

    def search(
        self,
        what: int | str,
        address: int | str,
        end: int | str | None = None,
        guest: Who | None = None,
        *,
        max: int | None = None,
        align: int | None = None,
    ) -> Matches:
        """Search memory for text, bytes with wildcards, or numbers.

        Text is searched as it is, a number as 4 bytes, or 8 where it needs them, bytes as "48 8b ?? 90". u8: u16: u32: u64:
        before an expression, str: utf16: hex: before text say which is meant. In linear, guest-physical or system-physical
        addresses; what is not mapped is passed over, and said.

        what: text, a number, bytes ("48 8b ?? 90"), or what u8: u16: u32: u64: str: utf16: hex: say
        address: where to begin: an address of any space
        end: else all of the symbol that ADDRESS names
        guest: whose; else who is selected
        max: matches at most (100)
        align: at its multiples only (1)
        """
        found = self._call(
            "search",
            {"what": what, "address": address, "end": end, "guest": guest, "max": max, "align": align},
            (),
        )
        assert isinstance(found, Matches)
        return found

    def skinit_trace(self) -> LaunchView | Text:
        """Show what the last SKINIT did: header, measurement, PCR 17, the state behind it.

        `skinit verify` says beforehand what it would be.
        """
        found = self._call("skinit trace", {}, ())
        assert isinstance(found, LaunchView | Text)
        return found

    def skinit_verify(self, address: int | str | None = None, *, file: str | PathLike[str] | None = None) -> Verdict:
        """Say what SKINIT would make of a block: its header, what is measured, PCR 17.

        PCR 17 is what a TPM has behind the launch: zeros, extended with the digest of the bytes that the header names.
        Wrong is an entry outside of them, a block not 64 KiB aligned or not below 4 GiB, an image shorter than it says.
        The exit status of `vmdbg inspect` is 1 if something is.

        address: system-physical, unless it says another space; without it EAX
        file: a raw image in place of memory
        """
        found = self._call("skinit verify", {"address": address, "file": file}, ())
        assert isinstance(found, Verdict)
        return found

    def snapshot_delete(self, name: int | str) -> Moments:
        """Forget a snapshot."""
        found = self._call("snapshot delete", {"name": name}, ())
        assert isinstance(found, Moments)
        return found

    def snapshot_restore(self, name: int | str) -> Restored:
        """Make the machine what it was when a snapshot was taken.

        Breakpoints, watchpoints and catchpoints stay. `restore` and `snapshot restore` are the same; gdb has a `restore` of its own.
        Behind `monitor restore` gdb still shows registers and memory of before: `maintenance flush register-cache` and `maintenance
        flush dcache` have it look again. `snapshot restore` of the module that `vmdbg gdb` loads does that by itself.
        """
        found = self._call("snapshot restore", {"name": name}, ())
        assert isinstance(found, Restored)
        return found

    def snapshot_save(self, file: str | PathLike[str], name: int | str | None = None) -> Kept:
        """Write the machine, or a snapshot of it, to a file.

        `vmdbg run --snapshot FILE` and `vmdbg console FILE` go on from it, as the machine itself would.

        name: a snapshot that was taken; now if none is named
        """
        found = self._call("snapshot save", {"file": file, "name": name}, ())
        assert isinstance(found, Kept)
        return found

    def snapshots(self) -> Moments:
        """List the snapshots.

        They last as long as the debugger, over a restart of the machine, too.
        """
        found = self._call("snapshots", {}, ())
        assert isinstance(found, Moments)
        return found

    def space(self, *words: object) -> Text:
        """Choose the addresses that reading and writing memory means.

        Also for `find` and `x`; breakpoints and symbols stay at gva. For an inferior, until gdb lets go of it.
        gdb does not tell here which inferior is selected: name its process where there are several.
          space gpa 2  what guest 2 takes for physical addresses
          space spa    physical addresses of the machine, past all page tables
          space gva    linear addresses again

        Words as in the command language: `space [gva|gpa|spa] [PID]`.
        """
        found = self._call("space", {}, words)
        assert isinstance(found, Text)
        return found

    def sstep(self, *words: object) -> Text:
        """Choose what a single step is, as QEMU's packets do, or say what is chosen.

        FLAGS is a sum. 1 ENABLE: there are steps (must be set). 2 NOIRQ: over the handlers of interrupts,
        which run meanwhile at full speed; without it, into them. 4 NOTIMER: time stands still with the
        machine, which is so whether it is set or not: a step takes the time of its instruction.
          sstep 5  step into handlers
          sstep 7  over them (default)

        Words as in the command language: `sstep [FLAGS]`.
        """
        found = self._call("sstep", {}, words)
        assert isinstance(found, Text)
        return found

    def stack(self, words: int | None = None, guest: Who | None = None) -> Stack:
        """Show the words at the top of the stack, with symbols.

        The word's size is that of the stack's mode. A first number is N; name a guest behind it, or with --guest.

        words: how many words (16)
        guest: whose; else who is selected
        """
        found = self._call("stack", {"words": words, "guest": guest}, ())
        assert isinstance(found, Stack)
        return found

    def step_into_guest(self, *words: object) -> Text:
        """Stop at a guest's first instruction behind the next VMRUN.

        Once, and for what resumes the hypervisor next: `continue`, `next` or `stepi` at VMRUN itself.
        GUEST waits for that one. If VMRUN refuses the VMCB, that stops, too.

        Words as in the command language: `step-into-guest [GUEST]`.
        """
        found = self._call("step-into-guest", {}, words)
        assert isinstance(found, Text)
        return found

    def stepi(self, n: int | None = None) -> Stopped:
        """Execute an instruction, or N, into calls, whatever steps are.

        n: how many (1)
        """
        found = self._call("stepi", {"n": n}, ())
        assert isinstance(found, Stopped)
        return found

    def stop_at(self, *words: object) -> Text:
        """Stop at a guest time at the latest, or say at which.

        Once. It is the same moment in every run: `time` says what it is now.
          stop-at 7600000  at this time
          stop-at +1000    in 1000 ticks

        Words as in the command language: `stop-at [TICKS|+TICKS|never]`.
        """
        found = self._call("stop-at", {}, words)
        assert isinstance(found, Text)
        return found

    def stop_on(self, *words: object) -> Text:
        """Stop at the next #VMEXIT with this code, or at what a hypervisor does wrong.

        vmrun-fail: VMRUN refuses a VMCB; shutdown: a guest ends so; stale: a strict mode has used
        something that the hypervisor forgot to flush. `why` tells more.
        `stop-on vmexit npf 2` is `catch once vmexit npf guest 2`, see there.
          stop-on vmexit npf
          stop-on vmexit 0x7b 2

        Words as in the command language: `stop-on vmexit CODE [GUEST] | vmrun-fail | shutdown | stale | nothing`.
        """
        found = self._call("stop-on", {}, words)
        assert isinstance(found, Text)
        return found

    def sym(self, name: int | str, guest: Who | None = None) -> Found:
        """Look up symbols: by name, pattern or part of a name, or the one that an address belongs to.

        Names are looked for in the selected inferior first, then in all others that have symbols; an address begins with a
        digit or has a colon or a + in it, and belongs to who is selected unless it says so.

        name: a name, a pattern with * and ?, a part of a name, or an address
        guest: whose; else who is selected
        """
        found = self._call("sym", {"name": name, "guest": guest}, ())
        assert isinstance(found, Found)
        return found

    def symbols(self, *words: object) -> Text:
        """Offer a file with symbols to gdb when it attaches to an inferior.

        OFFSET is added to all its addresses: gdb then has it as a shared library.
        With a 64-bit file the inferior gets 64-bit registers, whatever mode it is in at that moment.
          symbols 2 build/guest64.elf

        Words as in the command language: `symbols PID FILE [OFFSET]`.
        """
        found = self._call("symbols", {}, words)
        assert isinstance(found, Text)
        return found

    def tbreak(self, address: int | str, condition: str | None = None) -> Text:
        """Stop at an address, once.

        Of the selected inferior unless the address names another: host:main, 2:work. One of a guest that is not there yet
        waits for it. With `if`, only where the expression is not 0 then (see `help catch` for what it can ask for).

        condition: an expression that must not be 0 then
        """
        found = self._call("tbreak", {"address": address, "condition": condition}, ())
        assert isinstance(found, Text)
        return found

    def tcatch(self, *words: object) -> Set:
        """The same as catch once.

        Words as in the command language: `tcatch WHAT [guest N] [if EXPR]`.
        """
        found = self._call("tcatch", {}, words)
        assert isinstance(found, Set)
        return found

    def tlb_audit(self, guest: Who | None = None) -> TlbAudit:
        """Compare the translations that TLBs hold with what the tables say now.

        Needs `vmdbg run --tlb strict`: without it, nothing is held that the tables do not say. Stale ones are flushes
        that are due, or were forgotten; `stop-on stale` stops where one is used.

        guest: all of them if none is named
        """
        found = self._call("tlb audit", {"guest": guest}, ())
        assert isinstance(found, TlbAudit)
        return found

    def tpm_log(self) -> LogView | Text:
        """List what has changed PCRs since power-on: when, by whom, with which digest.

        By whom is a locality: 0 is the operating system, 4 the processor.
        The last 1024 changes are kept.
        """
        found = self._call("tpm log", {}, ())
        assert isinstance(found, LogView | Text)
        return found

    def tpm_pcr(self, n: int | None = None, *, bank: Literal['sha1', 'sha256'] | None = None) -> PcrView | Text:
        """Show the TPM's PCRs.

        No command is sent to the TPM: what software has begun there stays as it is.

        n: this one; without it all
        bank: of this bank; without it of all
        """
        found = self._call("tpm pcr", {"n": n, "bank": bank}, ())
        assert isinstance(found, PcrView | Text)
        return found

    def tracepoints(self, *words: object) -> Text:
        """List tracepoints, or say whose one is.

        gdb defines them all while one inferior is selected: they are taken for that one's, or where it has no
        memory at the address for one's that has.
          tracepoints 3 2  tracepoint 3 is one of guest 2

        Words as in the command language: `tracepoints [NUMBER PID]`.
        """
        found = self._call("tracepoints", {}, words)
        assert isinstance(found, Text)
        return found

    def tss(self, guest: Who | None = None) -> TaskState:
        """Show the task state segment: stacks, IST, the ports of its I/O permission bitmap.

        The ports are those that code without the privilege of IOPL may access all the same.

        guest: whose; else who is selected
        """
        found = self._call("tss", {"guest": guest}, ())
        assert isinstance(found, TaskState)
        return found

    def until(self, address: int | str) -> Stopped:
        """Run until an inferior gets to an address."""
        found = self._call("until", {"address": address}, ())
        assert isinstance(found, Stopped)
        return found

    def vmcb_diff(self, n: int | None = None, m: int | None = None, *, net: bool = False, guest: Who | None = None) -> VmcbDiff:
        """Show which fields of a VMCB changed between #VMEXITs, and who changed them.

        By hardware: #VMEXIT has stored it. By software: the hypervisor, or a debugger, before VMRUN. A store while
        the guest ran is one that #VMEXIT does not make: by another CPU, a device, or the guest itself. The VMCB is
        kept for the last 16 VMRUNs of each guest; `vmcb record` changes that, `exits` has the numbers.

        n: number of the #VMEXIT to begin with; else the one before the last
        m: number of the #VMEXIT to end with; else what is known last
        net: only fields that are others in the end, in one line each
        guest: the selected one if none is named
        """
        found = self._call("vmcb diff", {"n": n, "m": m, "net": net, "guest": guest}, ())
        assert isinstance(found, VmcbDiff)
        return found

    def vmcb_record(self, n: int | None = None) -> Text:
        """Say or choose for how many VMRUNs of each guest the VMCB is kept.

        Each takes 2.3 KiB. What is kept so far goes.

        n: how many VMRUNs with their #VMEXITs; 0 for none
        """
        found = self._call("vmcb record", {"n": n}, ())
        assert isinstance(found, Text)
        return found

    def vmcb_watch(self, field: int | str, guest: Who | None = None) -> Set:
        """Stop when a field of a VMCB has another value than at the last world switch.

        The stop says by whom: the processor at #VMEXIT, or software before VMRUN. It is `catch vmcb FIELD`, where
        conditions and counts may be added and which lists it; for the very store, watch the address in gdb.

        guest: all of them if none is named
        """
        found = self._call("vmcb watch", {"field": field, "guest": guest}, ())
        assert isinstance(found, Set)
        return found

    def vmrun_why(self, guest: Who | None = None) -> Why:
        """Say why VMRUN refuses a VMCB: every rule it breaks, the value, and the remedy.

        The rules are applied to the VMCB as it is in memory now.

        guest: whose VMCB, or where it is; else the selected guest's
        """
        found = self._call("vmrun why", {"guest": guest}, ())
        assert isinstance(found, Why)
        return found

    def who_maps(self, address: int | str, *, limit: int | None = None) -> WhoMaps:
        """Say what leads to a page, and whose it is: the reverse of all page tables there are.

        Looked through are the host's tables, those of each guest (through its nested ones), each nested table, and what
        devices reach: what IOMMU, DEV and SKINIT's protection all let pass. Whose it is: VMCB, HSAVE, IOPM, MSRPM,
        AVIC page, page table of which level of whom, table or ring of an IOMMU, the hypervisor's image, RAM of a guest. Of
        guests' tables those are known that their VMCBs name: not of each process.

        address: system-physical, unless it says another space, or whose it is
        limit: addresses that are listed of each set of tables (16)
        """
        found = self._call("who-maps", {"address": address, "limit": limit}, ())
        assert isinstance(found, WhoMaps)
        return found

    def why(self, *words: object) -> Text:
        """Why it stopped, VMRUN failed, a guest shut down, or something was refused.

        Words as in the command language: `why`.
        """
        found = self._call("why", {}, words)
        assert isinstance(found, Text)
        return found

    def why_no_irq(self, vector: int | str | None = None, *, guest: Who | None = None) -> Chain:
        """Say why an interrupt is not taken: each link of its way, and the one that blocks it.

        Of a guest, the way of virtual interrupts (V_IRQ, or AVIC) and that of physical ones; with vector 2 or nmi, of NMIs.
        Of the hypervisor, from the APIC or the PIC to its IF. A link that lets it pass is ok, one that does not NO; ? is not
        known, as in a dump. Without --guest, the selected guest or the host.

        vector: which one, 2 or nmi for NMIs; else any
        guest: who is meant; else who is selected
        """
        found = self._call("why-no-irq", {"vector": vector, "guest": guest}, ())
        assert isinstance(found, Chain)
        return found

    def would_exit(
        self,
        what: int | str | None = None,
        *,
        cpl: int | None = None,
        guest: Who | None = None,
        inner: bool = False,
    ) -> Predicted:
        """Say whether an instruction, an access or an event would leave a guest, and what decides it.

        WHAT is one of
          cpuid, rdmsr, invlpg, vmmcall ...   an instruction by its name, with the registers as they are
          0f a2                               an instruction by its bytes, in the guest's mode
          at ADDRESS                          the instruction there; `at` may be left out
          msr N|NAME r|w                      RDMSR or WRMSR
          port P [1|2|4] [in|out]             IN or OUT of so many bytes (1)
          cr N r|w [VALUE], dr N r|w [VALUE]  MOV of a control or debug register
          int VECTOR                          INT
          exception V                         an exception, by vector or name (pf)
          intr, nmi, smi, init, vintr, task-switch, ferr, shutdown   an event
        The processor looks at these things in this order, until one decides (table 15-7): exceptions that come before the
        intercept, its bit, and the bit of the permission map. EXITINFO1 and 2 are what the exit would say. What decides but
        is not known, as a general register in a dump, is named.

        what: what may exit, see above; else the guest's next instruction
        cpl: the privilege to ask for; else the current one
        guest: whose VMCB, or where it is; else the selected guest's
        inner: by the VMCB that the guest's own hypervisor made for it: whether that one gets the exit
        """
        found = self._call("would-exit", {"what": what, "cpl": cpl, "guest": guest, "inner": inner}, ())
        assert isinstance(found, Predicted)
        return found

    def x(self, format: str | None = None, address: int | str | None = None, guest: Who | None = None) -> Examined:
        """Examine memory in gdb's formats, at an address of any space.

        The format is a count, a letter and a size: x/8gx; without, one word in hexadecimal. Letters: x d u o t z c a f as in
        gdb, s a string, i instructions in the inferior's mode. Sizes: b 1, h 2, w 4, g 8 bytes. Devices are not read.

        format: count, letter (x d u o t z c a f s i) and size (b h w g), as gdb's x
        address: an address; with i the current instruction's if it is left out
        guest: whose; else who is selected
        """
        found = self._call("x", {"format": format, "address": address, "guest": guest}, ())
        assert isinstance(found, Examined)
        return found

    def xp(self, address: int | str, format: str | None = None) -> Examined:
        """Examine physical memory in gdb's formats.

        Addresses are system-physical; those with a guest's number, as 2:0x1000, are that guest's guest-physical ones.

        address: a system-physical address; one with a guest's number is guest-physical
        format: count, letter (x d u o t z c a f s i) and size (b h w g), as gdb's x
        """
        found = self._call("xp", {"address": address, "format": format}, ())
        assert isinstance(found, Examined)
        return found


class _InferiorCommands(_Called):
    """Some of the commands."""

    def breakpoints(self, *words: object) -> Text:
        """List breakpoints and watchpoints, or choose where they hit.

        One belongs to the address space that was in use when gdb first put it in, at a resume: to its
        page tables and the page found there. Set with paging off, or before the address was mapped, it
        hits everywhere once and then belongs there. What hits it elsewhere passes, and is counted.
          breakpoints shared  also where other tables have the same page at the address (default)
          breakpoints own     under its own page tables only
          breakpoints any     in every address space of the inferior

        Words as in the command language: `breakpoints [any|shared|own]`.
        """
        found = self._call("breakpoints", {}, words)
        assert isinstance(found, Text)
        return found

    def context(
        self,
        guest: Who | None = None,
        section: Sequence[Literal['regs', 'code', 'source', 'stack', 'vmcb', 'exit']] | None = None,
        *,
        width: int | None = None,
        rows: int | None = None,
    ) -> Situation:
        """Show an inferior at a glance: registers, code, stack, VMCB, last exits.

        Of a hypervisor the VMCB and the exits are those of the guest that left last. Registers that have changed since
        they were shown at an earlier time are marked by *.

        guest: whose; else the selected one's
        section: of regs, code, source, stack, vmcb, exit; else all of them
        width: of the screen (100)
        rows: lines of code, source, stack, exits
        """
        found = self._call("context", {"guest": guest, "section": section, "width": width, "rows": rows}, ())
        assert isinstance(found, Situation)
        return found

    def exits(
        self,
        guest: Who | None = None,
        last: int | None = None,
        *,
        by: Literal['code', 'rip', 'gpa', 'port', 'msr'] | None = None,
        code: int | str | None = None,
        if_: int | str | None = None,
        top: bool = False,
        jsonl: str | PathLike[str] | None = None,
        perfetto: str | PathLike[str] | None = None,
        plot: str | PathLike[str] | None = None,
    ) -> Exits | Histogram | ExitsWritten:
        """Show the last #VMEXITs of one guest or of all, oldest first; count, export or draw them.

        A first number that is the number of a guest names that guest. `in guest` is the time from VMRUN to the exit,
        `in host` from there to the CPU's next VMRUN, in ticks: bytes of code executed. The instruction is the one that the
        guest was at, as it was then; with ~ as memory has it now. VMRUN is where the host had entered the guest.

        last: the last so many: 20 if they are listed, else all that are remembered
        by: count them by code, rip, gpa, port, msr
        code: only those with this exit code
        if_: only those for which it holds: code gpa port msr write vector rip rax in_guest in_host ...
        top: those that cost the host most, the most first
        jsonl: write them as JSON lines
        perfetto: write a trace for ui.perfetto.dev or chrome://tracing: guests, and the host beside them
        plot: write a picture: a page, or an image if FILE ends in .svg
        """
        found = self._call(
            "exits",
            {
                "guest": guest,
                "last": last,
                "by": by,
                "code": code,
                "if_": if_,
                "top": top,
                "jsonl": jsonl,
                "perfetto": perfetto,
                "plot": plot,
            },
            (),
        )
        assert isinstance(found, Exits | Histogram | ExitsWritten)
        return found

    def guest(self, *words: object) -> Text:
        """Correct the guess which VMCBs are one guest, and whose.

          guest name 2 linux      call guest 2 so
          guest merge 2 3         VMCBs of guest 3 are vCPUs of guest 2
          guest split 2 0x801000  this VMCB is a guest of its own
          guest parent 3 2        guest 2 is a hypervisor, and guest 3 its guest (1: nobody's but ours)

        Words as in the command language: `guest name|merge|split|parent N ...`.
        """
        found = self._call("guest", {}, words)
        assert isinstance(found, Text)
        return found

    def guests(self, *, scan: bool = False, explain: bool = False) -> Guests | Scanned:
        """List the host and its guests as a tree: state, ASID, nCR3, paging mode, last exit, VMCBs.

        * marks the selected one. A guest that is run by another guest's hypervisor stands indented below that one.
        --scan searches all memory for VMCBs and host save areas; in a dump, what it finds become guests. A score is out of
        100: what speaks against a page is listed, with --explain also what speaks for it. "made in" a guest is what that
        one's own hypervisor made, "for" the guest that runs in its place.

        scan: search memory for VMCBs, without symbols
        explain: say what each score is made of
        """
        found = self._call("guests", {"scan": scan, "explain": explain}, ())
        assert isinstance(found, Guests | Scanned)
        return found

    def inferior(self, n: Who | None = None) -> Text:
        """Choose whose the commands are, or list who there is.

        Breakpoints choose the one that stops.

        n: the host (1), or a guest's number or name
        """
        found = self._call("inferior", {"n": n}, ())
        assert isinstance(found, Text)
        return found

    def restart(self) -> Text:
        """Start the machine over, and stop before its first instruction.

        Breakpoints stay; those of guests wait for these to appear.
        """
        found = self._call("restart", {}, ())
        assert isinstance(found, Text)
        return found

    def restore(self, name: int | str) -> Restored:
        """Make the machine what it was when a snapshot was taken.

        Breakpoints, watchpoints and catchpoints stay. `restore` and `snapshot restore` are the same; gdb has a `restore` of its own.
        Behind `monitor restore` gdb still shows registers and memory of before: `maintenance flush register-cache` and `maintenance
        flush dcache` have it look again. `snapshot restore` of the module that `vmdbg gdb` loads does that by itself.
        """
        found = self._call("restore", {"name": name}, ())
        assert isinstance(found, Restored)
        return found

    def snapshot(self, name: int | str) -> Taken:
        """Keep the machine as it is now, under a name, to come back to.

        CPUs, memory, devices, timers, and what was remembered of exits. The machine does not notice. Memory that has
        not changed since the snapshot before costs nothing. An earlier snapshot of this name is forgotten.
        """
        found = self._call("snapshot", {"name": name}, ())
        assert isinstance(found, Taken)
        return found

    def time(self, *words: object) -> Text:
        """Guest time in ticks (bytes of code executed).

        Words as in the command language: `time`.
        """
        found = self._call("time", {}, words)
        assert isinstance(found, Text)
        return found


class _Nowhere(_Called):
    """Some of the commands."""

    def catch(self, *words: object) -> Listing | Set:
        """Stop at an event of the processor, or list such catchpoints with their hits.

          vmexit [CODE|any]    a guest has left; CODE is a name (npf, cpuid, vmmcall) or a number
          vmrun                VMRUN, before it is executed
          skinit               SKINIT, before it is executed or intercepted
          inject [VECTOR]      VMRUN that injects an event through EVENTINJ
          exception [VECTOR]   an exception (14, pf), before it is delivered, intercepted or not
          io [PORT] [r|w]      an access to a port (0x3f8, 0x3f8-0x3ff)
          msr [MSR] [r|w]      RDMSR or WRMSR (0xc0000080, efer)
          cr [N] [r|w]         a read or write of a control register
          guest-start          a guest runs for the first time
          triple-fault         of a guest or of the hypervisor
          vmcb FIELD           a field of a VMCB has another value than at the last world switch; old and value are numbers of it
          dma [BDF] [r|w]      a transaction of a device (00:03.0, 00:03.0-00:04.7), made or refused
          iommu-fault [BDF] [r|w]   an IOMMU refuses a transaction or an interrupt, logged or not
        Behind these: `guest N` for one guest only (1: the hypervisor), `if EXPR` for what must hold then. `once` before them, or
        tcatch, deletes it when it stops. Ranges are FIRST-LAST. What `if` can ask for:
          rax, $exitcode, vmcb.cs.base            registers, VMCB fields
          code info1 info2 gpa gva port size msr write vector error cr reg value slb    of the event, as far as it has them
          requester iova pasid length translated refused event domain interrupt    of DMA and what an IOMMU refuses
          guest cpu time cpl                      whose it is, and when
          u32[$rsp + 8], u8[gpa:0x1000], u64[host:counter]    memory
          && || ! == < + << & ...                 as in C, in unsigned 64 bits
          catch vmexit npf if gpa >= 0xfee00000 && gpa < 0xfee01000
          catch msr w 0xc0000080 guest 2
          catch ignore 2 100       pass over the next 100 hits of number 2
          catch disable 2          or enable, delete; `delete all`

        Words as in the command language: `catch [once] WHAT [guest N] [if EXPR] | delete N|all | enable|disable N | ignore N COUNT`.
        """
        found = self._call("catch", {}, words)
        assert isinstance(found, Listing | Set)
        return found

    def finish(self) -> Stopped:
        """Run until the selected thread returns from its function."""
        found = self._call("finish", {}, ())
        assert isinstance(found, Stopped)
        return found

    def next(self, n: int | None = None) -> Stopped:
        """The same, over calls and repeated string instructions.

        n: how many (1)
        """
        found = self._call("next", {"n": n}, ())
        assert isinstance(found, Stopped)
        return found

    def step(self, n: int | None = None) -> Stopped:
        """Execute one instruction of the selected thread, or N, into calls.

        After `set steps line` it is a line of the source, where lines are known.
        `follow`, `sstep` and `step-into-guest` say what a step is where a guest leaves, or an interrupt comes.

        n: how many (1)
        """
        found = self._call("step", {"n": n}, ())
        assert isinstance(found, Stopped)
        return found

    def thread(self, n: int | None = None) -> Text:
        """Choose a CPU or vCPU of the selected inferior, or list them.

        n: of the selected inferior
        """
        found = self._call("thread", {"n": n}, ())
        assert isinstance(found, Text)
        return found

    def watch(self, *words: object) -> Text:
        """Stop when memory is written (w), read (r) or either (a), and say who did it; or list, or delete.

        ADDRESS is linear (gva, the default), guest-physical or system-physical, of the selected inferior
        unless another is named (1 is the hypervisor). LENGTH is 1 to 4096 bytes (8). All see stores of any
        inferior to the same memory, of the processor itself (page walks, events, VMCBs) and of devices.
          watch spa:0x10f6000
          watch 2:gpa:0x5000 4096 a
          watch delete 1

        Words as in the command language: `watch [[GUEST:][gva:|gpa:|spa:]ADDRESS [LENGTH] [w|r|a]] | watch delete N`.
        """
        found = self._call("watch", {}, words)
        assert isinstance(found, Text)
        return found


class _MachineCommands(_Called):
    """Some of the commands."""

    def vmcb(self, guest: Who | None = None, inner: Literal['inner'] | None = None) -> VmcbView:
        """Decode every field of a VMCB, with flags by name and oddities marked by !.

        PA is a system-physical address; a number that is a guest's names the guest. With `inner`, the VMCB that the
        hypervisor within another guest made for it: what the processor runs is made of that one and its own.

        guest: whose VMCB, or where it is; else the selected guest's
        inner: the VMCB that the guest's own hypervisor made for it
        """
        found = self._call("vmcb", {"guest": guest, "inner": inner}, ())
        assert isinstance(found, VmcbView)
        return found

    def walk(
        self,
        gva: int | str,
        guest: Who | None = None,
        access: Literal['r', 'w', 'x', 'ru', 'rs', 'wu', 'ws', 'xu', 'xs'] | None = None,
        *,
        cpl: int | None = None,
        vmcb: int | str | None = None,
    ) -> Walked:
        """Translate a linear address: every entry of both dimensions, rights, verdict, memory type.

        Without GUEST the selected guest, or the host. The access is a read with the current privilege unless given:
        r read, w write, x execute; u as user, s as supervisor. Entries named n... belong to the nested page tables.
        Nothing in memory changes, not even accessed and dirty bits.

        guest: whose address it is, if it does not say so itself
        access: read, write or execute (r); ru ... xs say as whom, too
        cpl: the privilege of the access; else the current one
        vmcb: a VMCB anywhere in memory, whose guest is meant
        """
        found = self._call("walk", {"gva": gva, "guest": guest, "access": access, "cpl": cpl, "vmcb": vmcb}, ())
        assert isinstance(found, Walked)
        return found


class InferiorCommands(_Everywhere, _InferiorCommands):
    """Those commands whose names have no other use here."""


class MachineCommands(_Everywhere, _MachineCommands):
    """Those commands whose names have no other use here."""


class Commands(_Everywhere, _InferiorCommands, _Nowhere, _MachineCommands):
    """All commands."""


RESULTS: tuple[type, ...] = (
    Text,
    Audit,
    Avic,
    Backtrace,
    Listing,
    Set,
    CleanBits,
    Situation,
    Stopped,
    Cpuid,
    Points,
    DevView,
    Devices,
    Disassembly,
    Transaction,
    Moved,
    Exits,
    Histogram,
    ExitsWritten,
    Held,
    FingerprintView,
    Table,
    Guests,
    Scanned,
    Help,
    Where,
    Vectors,
    Intercepts,
    State,
    CommandsList,
    DeviceList,
    Events,
    GuestInterrupts,
    InterruptTable,
    Map,
    Pasids,
    Requests,
    Tlb,
    WalkedIo,
    Ports,
    Interrupt,
    Leaks,
    MsrMsrs,
    PermissionsMsrs,
    MapView,
    Space,
    TablesWritten,
    Decoded,
    Tree,
    Value,
    Registers,
    Restored,
    Rules,
    SavedCore,
    Matches,
    LaunchView,
    Verdict,
    Taken,
    Moments,
    Kept,
    Stack,
    Found,
    TlbAudit,
    LogView,
    PcrView,
    TaskState,
    VmcbView,
    VmcbDiff,
    Why,
    Walked,
    WhoMaps,
    Chain,
    Predicted,
    Examined,
)
"""What they give."""
