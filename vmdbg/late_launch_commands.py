"""`skinit trace`, `tpm` and `dev`: what the last SKINIT did, what the TPM holds, and what devices are kept from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from introspect.commands import Arguments, Command, Context
from introspect.commands.parameters import Choice, Number, Parameter, Requester
from introspect.commands.render import columns, size_text
from introspect.dev import DEV_CR, DEV_ERR_STATUS, DevRegisters, denied_pages
from introspect.pci import RequesterId
from introspect.skinit import SLB_SIZE, STATE_AFTER, TPM_FAILED, Launch
from introspect.tpm import BANKS, PCRS, Algorithm
from vmdbg.platform.tpm.pcr import Change
from vmdbg.results import Text

if TYPE_CHECKING:
    from vmdbg.debugger import Debugger
    from vmdbg.late_launch import LateLaunch
    from vmdbg.machine import Machine

_TOLD = 16
"""Stretches of denied pages that are listed of a domain."""
_SHOWN = 32
"""Bytes of the image that `skinit trace` shows."""
_NO_TPM = Text("the machine has no TPM; --tpm gives it one")


def _by_domain(machine: Machine, registers: DevRegisters) -> Mapping[int, list[RequesterId]]:
    """The functions that are no bridges, by protection domain."""
    found: dict[int, list[RequesterId]] = {}
    for function in machine.chipset.root.functions:
        if function.class_code >> 16 != 6:
            found.setdefault(registers.domain_of(function.requester), []).append(function.requester)
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class LaunchView:
    """The last SKINIT."""

    launch: Launch
    protected: bool
    """Whether devices are still kept from the block."""

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        one, block = self.launch, self.launch.block
        where = "of a guest whose hypervisor let it" if one.guest else "of the hypervisor"
        yield f"SKINIT at RIP {one.rip:#x} {where}, on CPU {one.cpu}, at {one.time} ticks"
        state = "kept from devices" if self.protected else "no longer kept from devices: software has ended that"
        yield f"block {block.base:#x}-{block.base + SLB_SIZE - 1:#x}, {state}"
        yield f"  header: entry {block.entry:#x}, length {block.length:#x}; the loader starts at {block.start:#x}"
        running = f"CPU {', '.join(map(str, one.running))} did not wait for a start-up IPI" if one.running else "all waited"
        yield f"  other processors: {running}"
        shown = one.image[:_SHOWN].hex(" ")
        more, verb = " ..." * (len(one.image) > _SHOWN), "were to be measured" if one.failed else "measured"
        yield f"  {len(one.image):#x} bytes {verb}: {shown}{more}"
        if one.failed:
            yield f"! not measured: {TPM_FAILED[one.failed]}"
        yield from columns(((f"{bank.word} PCR 17", value.hex()) for bank, value in one.pcr17.items()), "  ")
        yield "state behind it:"
        rows = [(row.name, f"{one.state[row.name]:#x}", row.section, row.words) for row in STATE_AFTER if self._worth(row.name)]
        yield from columns(rows, "  ")

    def _worth(self, name: str) -> bool:
        """Not each of the registers that are simply 0."""
        return bool(self.launch.state[name]) or name in ("efer", "gif")

    def json(self) -> object:
        one, block = self.launch, self.launch.block
        return {
            "time": one.time, "cpu": one.cpu, "rip": one.rip, "guest": one.guest, "base": block.base, "entry": block.entry,
            "length": block.length, "measured": len(one.image), "image": one.image.hex(), "running": list(one.running),
            "failed": one.failed or None, "pcr17": {bank.word: value.hex() for bank, value in one.pcr17.items()},
            "protected": self.protected, "state": dict(one.state),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class PcrView:
    """Values of PCRs, by bank and number."""

    banks: Mapping[Algorithm, Mapping[int, bytes]]

    def text(self) -> str:
        """As tpm2_pcrread has it."""
        lines = []
        for bank, values in self.banks.items():
            lines.append(f"{bank.word}:")
            lines += [f"  {number:<2}: 0x{value.hex().upper()}" for number, value in values.items()]
        return "\n".join(lines)

    def json(self) -> object:
        return {bank.word: {str(n): value.hex() for n, value in values.items()} for bank, values in self.banks.items()}


@dataclass(frozen=True, slots=True)
class LogView:
    """What has changed PCRs, the oldest first."""

    changes: tuple[Change, ...]

    def text(self) -> str:
        rows = [("time", "PCR", "locality", "what", "extended with (sha256, else sha1)")]
        for one in self.changes:
            digest = one.digests.get(Algorithm.SHA256) or one.digests.get(Algorithm.SHA1) or b""
            rows.append((str(one.time), str(one.pcr), str(one.locality), one.what, digest.hex()))
        return "\n".join(columns(rows)) if self.changes else "no PCR has changed since power-on"

    def json(self) -> object:
        return [
            {"time": one.time, "pcr": one.pcr, "locality": one.locality, "what": one.what,
             "digests": {bank.word: digest.hex() for bank, digest in one.digests.items()}}
            for one in self.changes
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class DomainView:
    number: int
    valid: bool
    protect: bool
    base: int
    size: int
    devices: tuple[str, ...]
    denied: tuple[tuple[int, int], ...]
    """(first, end) addresses below the end of RAM."""

    def lines(self) -> Iterator[str]:
        who = ", ".join(self.devices) or "no device"
        if not self.valid:
            yield f"domain {self.number}: not valid: nothing is denied; {who}"
            return
        beyond = "denied" if self.protect else "allowed"
        yield f"domain {self.number}: bitmap at {self.base:#x} for {size_text(self.size)}, {beyond} beyond; {who}"
        for first, end in self.denied[:_TOLD]:
            yield f"  denied {first:#x}-{end - 1:#x}, {size_text(end - first)}"
        if len(self.denied) > _TOLD:
            yield f"  ... and {len(self.denied) - _TOLD} more stretches"
        if not self.denied:
            yield "  nothing is denied"


@dataclass(frozen=True, slots=True)
class DevView:
    """The device exclusion vector, and the block that SKINIT protects."""

    there: bool
    control: int
    err_status: int
    err_addr: int
    refusals: int
    last: str
    maps: tuple[tuple[int, int, int], ...]
    domains: tuple[DomainView, ...]
    block: int | None

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        if self.block is not None:
            yield f"SL_DEV: {self.block:#x}-{self.block + SLB_SIZE - 1:#x} is kept from all devices since SKINIT"
        else:
            yield "SL_DEV: no block is kept from devices"
        if not self.there:
            yield "the machine has no DEV: --dev gives it one"
            return
        yield f"DEV_CR {self.control:#x} {DEV_CR.describe(self.control)}".rstrip()
        if not self.control & DEV_CR.DEVEN:
            yield "  DEVEN is clear: no domain denies anything"
        error = f"{self.err_addr:#x} was refused first" if self.err_status & DEV_ERR_STATUS.VALID else "none"
        yield f"error registers: {error}; {self.refusals} refused in all" + (f", the last: {self.last}" if self.last else "")
        for bus, device, domain in self.maps:
            yield f"map: {bus:02x}:{device:02x} is in domain {domain}"
        for one in self.domains:
            yield from one.lines()

    def json(self) -> object:
        return {
            "there": self.there, "control": self.control, "err_status": self.err_status, "err_addr": self.err_addr,
            "refusals": self.refusals, "last": self.last or None, "maps": [list(one) for one in self.maps], "block": self.block,
            "domains": [
                {"number": one.number, "valid": one.valid, "protect": one.protect, "base": one.base, "size": one.size,
                 "devices": list(one.devices), "denied": [list(each) for each in one.denied]}
                for one in self.domains
            ],
        }  # fmt: skip


class LateLaunchCommands:
    """Those of one debugger's machine."""

    def __init__(self, debugger: Debugger) -> None:
        self.debugger = debugger
        self._number = Parameter("N", Number(0, PCRS - 1), optional=True, help="this one; without it all")
        self._bank = Parameter("BANK", Choice(tuple(bank.word for bank in BANKS)), optional=True, option="--bank",
                               only_option=True, help="of this bank; without it of all")  # fmt: skip
        self._who = Parameter("BDF", Requester(), optional=True, help="only the domain of this device")
        self.commands = (
            Command("skinit trace", self._trace,
                    "Show what the last SKINIT did: header, measurement, PCR 17, the state behind it.", (),
                    "`skinit verify` says beforehand what it would be.", ("skinit trace", "skinit trace --json")),
            Command("tpm pcr", self._pcr, "Show the TPM's PCRs.", (self._number, self._bank),
                    "No command is sent to the TPM: what software has begun there stays as it is.", ("tpm pcr", "tpm pcr 17")),
            Command("tpm log", self._log, "List what has changed PCRs since power-on: when, by whom, with which digest.", (),
                    "By whom is a locality: 0 is the operating system, 4 the processor.\nThe last 1024 changes are kept.",
                    ("tpm log", "tpm log --json")),
            Command("dev", self._dev, "Show the device exclusion vector: registers, domains, what they deny.", (self._who,),
                    "`dma try` says what it makes of one access; `audit isolation` and `who-maps` know it, too.",
                    ("dev", "dev 00:03.0")),
        )  # fmt: skip

    @property
    def _late(self) -> LateLaunch:
        return self.debugger.machine.late_launch

    def _trace(self, context: Context, arguments: Arguments) -> LaunchView | Text:
        launch = self._late.last
        if launch is None:
            return Text("no SKINIT has been executed; `skinit verify` says what one would do")
        return LaunchView(launch, self._late.protection.base == launch.block.base)

    def _pcr(self, context: Context, arguments: Arguments) -> PcrView | Text:
        if self._late.tis is None:
            return _NO_TPM
        number, word = arguments.get(self._number), arguments.get(self._bank)
        numbers = range(PCRS) if number is None else (number,)
        banks = [bank for bank in BANKS if word in (None, bank.word)]
        values = self._late.tis.tpm.pcrs.banks
        return PcrView({bank: {n: values[bank][n] for n in numbers} for bank in banks})

    def _log(self, context: Context, arguments: Arguments) -> LogView | Text:
        return _NO_TPM if self._late.tis is None else LogView(tuple(self._late.tis.tpm.pcrs.log))

    def _dev(self, context: Context, arguments: Arguments) -> DevView:
        late, machine = self._late, self.debugger.machine
        block = late.protection.base
        if late.dev is None:
            return DevView(False, 0, 0, 0, 0, "", (), (), block)
        registers = late.dev.registers
        devices = _by_domain(machine, registers)
        who = arguments.get(self._who)
        if who is not None:
            numbers = {registers.domain_of(who)}
        else:
            valid = {n for n in range(len(registers.base_lo)) if registers.domain(n).valid}
            numbers = valid | set(devices) | {domain for _, _, domain in registers.mapped()}
        domains = []
        for number in sorted(numbers):
            domain = registers.domain(number)
            names = tuple(str(one) for one in devices.get(number, ()))
            denied = tuple(denied_pages(machine.ram, domain, machine.ram.end))
            domains.append(DomainView(number, domain.valid, domain.protect, domain.base, domain.size, names, denied))
        return DevView(
            True, registers.cr, registers.err_status, registers.err_addr, late.dev.refusals, late.dev.last,
            tuple(registers.mapped()), tuple(domains), block,
        )  # fmt: skip
