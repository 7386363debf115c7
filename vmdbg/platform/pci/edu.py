"""A device to try drivers and DMA on, compatible with QEMU's "edu" (its register list: QEMU's docs/specs/edu).

With address translation services there are two registers more: which PASID its requests have, and what became of the last
transfer. A page that the tables do not map is then asked for, if page requests are on, and the transfer waits for the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from math import factorial

from introspect.pci import PageResponse
from vmdbg.platform.bus import State
from vmdbg.platform.clock import TICKS_PER_SECOND, Clock
from vmdbg.platform.pci.ats import Ats, NotMappedError, PageRequests, Pasid
from vmdbg.platform.pci.capability import Capability, Express, ExtendedCapability, Msi, Power
from vmdbg.platform.pci.dma import PLAIN, Attributes, DmaError
from vmdbg.platform.pci.function import Bar, Function

IDENTIFICATION = 0x010000ED
BUFFER, BUFFER_SIZE = 0x40000, 4096
DMA_TICKS = TICKS_PER_SECOND // 200_000
"""Guest time that a transfer takes: 5 us, so that who polls need not do it long."""
FACTORIAL_TICKS = TICKS_PER_SECOND // 100_000
START, TO_MEMORY, RAISE = 1, 2, 4
"""Bits of the DMA command."""
DMA_INTERRUPT, FACTORIAL_INTERRUPT = 0x100, 1
COMPUTING, RAISE_AFTER = 1, 0x80
"""Bits of the status register."""
MOST_FACTORIAL = 34
"""From here on a factorial is 0 in 32 bits."""


class Register(IntEnum):
    ID = 0x00
    LIVENESS = 0x04
    FACTORIAL = 0x08
    STATUS = 0x20
    INTERRUPT_STATUS = 0x24
    INTERRUPT_RAISE = 0x60
    INTERRUPT_ACKNOWLEDGE = 0x64
    DMA_SOURCE = 0x80
    DMA_DESTINATION = 0x88
    DMA_COUNT = 0x90
    DMA_COMMAND = 0x98
    PASID = 0xA0
    RESULT = 0xA8


class Result(IntEnum):
    """Of a transfer, in the low bits of RESULT; of all but the first two, the address of the page in bits 63:12."""

    DONE = 0
    ABORTED = 1
    """By the IOMMU, or because nothing is there."""
    NOT_MAPPED = 2
    """Its translation was answered without the right, and no page could be asked for."""
    INVALID = 3
    FAILED = 4
    """So its page request was answered."""


WITH_PASID, PRIVILEGED, EXECUTE = 1 << 31, 1 << 30, 1 << 29
"""Of the PASID register, whose bits 19:0 are the number."""
WIDE = 0x80
"""From this offset on registers have 64 bits, and may be written in halves."""


@dataclass(frozen=True)
class EduOptions:
    """`dma_mask`: address bits that DMA has; `express`: it has the PCI Express capability, and so function-level reset."""

    dma_mask: int = 28
    express: bool = True


class Edu(Function):
    kind, title = "edu", "a device to try drivers and DMA on"
    vendor_id, device_id, class_code, revision = 0x1234, 0x11E8, 0x00FF00, 0x10
    subsystem = (0x1AF4, 0x1100)
    bars = (Bar(0, 1 << 20, width=8),)
    interrupt_pin = 1

    def __init__(self, clock: Clock, options: EduOptions | None = None) -> None:
        super().__init__(clock)
        self.options = options or EduOptions()
        self.device_reset()

    def identity(self) -> Mapping[str, str | int | bool]:
        return asdict(self.options)

    def make_capabilities(self) -> Iterable[Capability]:
        yield Msi()
        if self.options.express:
            yield Express()
            yield Power()

    def make_extended(self) -> Iterable[ExtendedCapability]:
        return (Ats(), PageRequests(), Pasid()) if self.ats else ()

    def device_reset(self) -> None:
        self.buffer = bytearray(BUFFER_SIZE)
        self.liveness = self.status = self.interrupts = 0
        self.factorial = 0
        self.wide = dict.fromkeys(
            (Register.DMA_SOURCE, Register.DMA_DESTINATION, Register.DMA_COUNT, Register.DMA_COMMAND, Register.PASID), 0
        )
        self.result = 0
        self._asked: tuple[int, int] | None = None
        """The group of page requests, and the first page."""

    def state(self) -> State:
        registers = {one.name.lower(): value for one, value in self.wide.items() if one != Register.PASID or self.ats}
        found: dict[str, int | str] = {
            "status": self.status, "interrupt_status": self.interrupts, "factorial": self.factorial, **registers,
        }  # fmt: skip
        ats = self.capability(Ats)
        if ats is not None:
            at = f" at {self.result & -0x1000:#x}" if self.result >= 0x1000 else ""
            found["result"] = Result(self.result & 0xFFF).name.lower().replace("_", " ") + at
            waits = f"for an answer to page request {self._asked[0]}, {self._asked[1]:#x}" if self._asked else "no"
            found |= {"waits": waits, "translations": sum(len(one) for sizes in ats.kept.values() for one in sizes.values()),
                      "translation_requests": ats.requests}  # fmt: skip
        return found

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        if BUFFER <= offset < BUFFER + BUFFER_SIZE:
            at = offset - BUFFER
            return int.from_bytes(self.buffer[at : at + size], "little")
        if size < 4 or (offset < WIDE and size != 4):
            return -1
        wide = self._wide_at(offset)
        if wide is not None:
            return self.wide[wide] >> 8 * (offset & 7)
        if offset & ~7 == Register.RESULT and self.ats:
            return self.result >> 8 * (offset & 7)
        match offset:
            case Register.ID:
                return IDENTIFICATION
            case Register.LIVENESS:
                return self.liveness
            case Register.FACTORIAL:
                return self.factorial
            case Register.STATUS:
                return self.status
            case Register.INTERRUPT_STATUS:
                return self.interrupts
        return -1

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        if BUFFER <= offset < BUFFER + BUFFER_SIZE:
            at = offset - BUFFER
            data = value.to_bytes(size, "little")[: BUFFER_SIZE - at]
            self.buffer[at : at + len(data)] = data
            return
        if size < 4 or (offset < WIDE and size != 4):
            return
        wide = self._wide_at(offset)
        if wide is not None and offset % size == 0:
            self._write_wide(wide, 8 * (offset & 7), size, value)
        match offset:
            case Register.LIVENESS:
                self.liveness = ~value & 0xFFFFFFFF
            case Register.FACTORIAL:
                if not self.status & COMPUTING:
                    self.factorial = value
                    self.status |= COMPUTING
                    self.later(FACTORIAL_TICKS, self._computed)
            case Register.STATUS:
                self.status = self.status & ~RAISE_AFTER | value & RAISE_AFTER
            case Register.INTERRUPT_RAISE:
                self._raise(value)
            case Register.INTERRUPT_ACKNOWLEDGE:
                self.interrupts &= ~value
                self.set_intx(bool(self.interrupts))

    def _wide_at(self, offset: int) -> Register | None:
        """Of those that software writes; the PASID is ATS's."""
        at = offset & ~7
        return Register(at) if at in self.wide and (at != Register.PASID or self.ats) else None

    def _write_wide(self, register: Register, shift: int, size: int, value: int) -> None:
        """Nothing changes while a transfer is under way."""
        if self.wide[Register.DMA_COMMAND] & START:
            return
        mask = (1 << 8 * size) - 1 << shift
        self.wide[register] = self.wide[register] & ~mask | value << shift & mask
        if register == Register.DMA_COMMAND and self.wide[register] & START:
            self.result = Result.DONE
            self.later(DMA_TICKS, self._transfer)

    def _computed(self) -> None:
        self.factorial = factorial(self.factorial) & 0xFFFFFFFF if self.factorial < MOST_FACTORIAL else 0
        self.status &= ~COMPUTING
        if self.status & RAISE_AFTER:
            self._raise(FACTORIAL_INTERRUPT)

    def _raise(self, why: int) -> None:
        self.interrupts |= why
        if self.interrupts:
            self.signal()
            self.set_intx(True)

    def _transfer(self) -> None:
        """Between memory and the buffer; what does not fit the buffer is not transferred, and neither is what is refused.

        A transfer that waits for pages begins anew behind the answer."""
        command, count = self.wide[Register.DMA_COMMAND], self.wide[Register.DMA_COUNT]
        source, destination = self.wide[Register.DMA_SOURCE], self.wide[Register.DMA_DESTINATION]
        inside, outside = (source, destination) if command & TO_MEMORY else (destination, source)
        outside &= (1 << self.options.dma_mask) - 1
        at = inside - BUFFER
        if 0 <= at <= at + count <= BUFFER_SIZE:
            try:
                if command & TO_MEMORY:
                    self.dma_write(outside, bytes(self.buffer[at : at + count]), self._attributes())
                else:
                    self.buffer[at : at + count] = self.dma_read(outside, count, self._attributes())
            except NotMappedError as error:
                if self._ask(error):
                    return
            except DmaError:
                self.result = Result.ABORTED  # the status register tells, too
        self._done()

    def _attributes(self) -> Attributes:
        value = self.wide[Register.PASID]
        if not value & WITH_PASID:
            return PLAIN
        return Attributes(value & 0xFFFFF, bool(value & PRIVILEGED), bool(value & EXECUTE))

    def _ask(self, error: NotMappedError) -> bool:
        """Whether a page request is on its way."""
        page, requests = error.address, self.capability(PageRequests)
        tag = requests.ask(error.pages, not error.write, error.write, self._attributes()) if requests is not None else None
        if tag is None:
            self.result = page | Result.NOT_MAPPED
            return False
        self._asked = tag, page
        return True

    def page_response(self, tag: int, response: int) -> None:
        if self._asked is None or self._asked[0] != tag:
            return
        page, self._asked = self._asked[1], None
        if response == PageResponse.SUCCESS:
            self.later(1, self._transfer)
            return
        self.result = page | (Result.INVALID if response == PageResponse.INVALID else Result.FAILED)
        self._done()

    def _done(self) -> None:
        command = self.wide[Register.DMA_COMMAND]
        self.wide[Register.DMA_COMMAND] = command & ~START
        if command & RAISE:
            self._raise(DMA_INTERRUPT)
