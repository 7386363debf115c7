# SPDX-License-Identifier: GPL-2.0-or-later
"""A device with translation services: its own cache, page requests, PASIDs, and what becomes of translated addresses."""

from __future__ import annotations

import pytest

from introspect.iommu.records import INVALIDATE_EVERYTHING, PPR_RECORD, CommandCode, EventCode
from introspect.iommu.registers import CONTROL
from introspect.iommu.structures import PTE
from introspect.paging import ENTRY
from introspect.pci import (
    ATS_CONTROL,
    COMMAND,
    PASID_CONTROL,
    PRI_CONTROL,
    PRI_STATUS,
    STATUS,
    ExtendedId,
    PageResponse,
    RequesterId,
    extended_capabilities,
)
from tests.iommu.rig import DATA, DEVICE, ON, PPR_AT, Bench
from tests.iommu.test_guest_tables import GVA, PASID, Guest
from vmdbg.platform.pci.ats import ATS, PRI
from vmdbg.platform.pci.ats import PASID as PASIDS
from vmdbg.platform.pci.catalogue import DeviceError
from vmdbg.platform.pci.dma import Attributes, DmaError
from vmdbg.platform.pci.edu import BUFFER, WITH_PASID, Edu, Register, Result

EDU = "edu,slot=03.0,dma-mask=64,ats=on"
IOVA = 0x345000
ALL_ON = ON | CONTROL.GTEn | CONTROL.PprEn | CONTROL.PprLogEn


class Served(Bench):
    """A bench with such a device, whose services are turned on as a driver does."""

    def __init__(self, device: str = EDU, *, strict: bool = False, ats: bool = True, requests: int = 32, pasid: bool = False) -> None:
        super().__init__(device, strict=strict, control=ALL_ON)
        self.command("00:03.0")
        self.edu = self.function("edu")
        assert isinstance(self.edu, Edu)
        self.stale: list[str] = []
        self.unit.stale_listeners.append(self.stale.append)
        if pasid:
            self.config(ExtendedId.PASID, PASIDS.offset_of("control"), PASID_CONTROL.defined)
        if requests:
            self.config(ExtendedId.PRI, PRI.offset_of("allocation"), requests, 4)
            self.config(ExtendedId.PRI, PRI.offset_of("control"), PRI_CONTROL.ENABLE)
        if ats:
            self.turn_on()

    def at(self, number: int) -> int:
        return next(at for at, found in extended_capabilities(self.edu.config.bytes) if found == number)

    def config(self, number: int, offset: int, value: int | None = None, size: int = 2) -> int:
        """Read or, given a value, write in an extended capability, as MMCONFIG does."""
        where = self.at(number) + offset
        if value is not None:
            self.root.write_config(DEVICE, where, size, value)
        return self.root.read_config(DEVICE, where, size)

    def turn_on(self, on: bool = True) -> None:
        self.config(ExtendedId.ATS, ATS.offset_of("control"), ATS_CONTROL.ENABLE if on else 0)

    @property
    def status(self) -> int:
        return self.config(ExtendedId.PRI, PRI.offset_of("status"))

    # The driver of edu

    def start(self, address: int, *, write: bool, data: bytes = b"", length: int = 8) -> None:
        """A transfer of edu's, which takes a moment."""
        edu = self.edu
        if write:
            for offset, byte in enumerate(data):
                edu.write_bar(0, BUFFER + offset, 1, byte)
        ends = (BUFFER, address) if write else (address, BUFFER)
        for register, value in zip((Register.DMA_SOURCE, Register.DMA_DESTINATION), ends, strict=True):
            edu.write_bar(0, register, 8, value)
        edu.write_bar(0, Register.DMA_COUNT, 8, len(data) if write else length)
        edu.write_bar(0, Register.DMA_COMMAND, 8, 3 if write else 1)
        self.pass_time(100_000)

    @property
    def busy(self) -> bool:
        return bool(self.edu.read_bar(0, Register.DMA_COMMAND, 8) & 1)

    @property
    def result(self) -> tuple[Result, int]:
        value = self.edu.read_bar(0, Register.RESULT, 8)
        return Result(value & 0xFFF), value & -0x1000

    def sends(self, data: bytes, address: int = IOVA) -> Result:
        self.start(address, write=True, data=data)
        assert not self.busy
        return self.result[0]

    @property
    def requests(self) -> int:
        return int(self.edu.state()["translation_requests"])

    def invalidate(self, address: int = INVALIDATE_EVERYTHING, size: int = 1, **fields: int) -> None:
        self.issue(CommandCode.INVALIDATE_IOTLB_PAGES, DeviceID=DEVICE, Address=address >> 12, S=size, **fields)

    def page_request(self) -> dict[str, int]:
        """The only one in the log, which is taken out."""
        head, tail = self.get("ppr_head"), self.get("ppr_tail")
        assert tail == head + 16
        record = int.from_bytes(self.ram.read(PPR_AT + head, 16), "little")
        self.put("ppr_head", tail)
        return {name: PPR_RECORD.get(record, name) for name in PPR_RECORD.fields}

    def complete(self, tag: int, response: int = PageResponse.SUCCESS, **fields: int) -> None:
        self.issue(
            CommandCode.COMPLETE_PPR_REQUEST, DeviceID=DEVICE, CompletionTag=tag & 0x1FF | response << 12, **fields
        )
        self.commands_done()
        self.pass_time(100_000)


# What software finds


def test_the_chain() -> None:
    bench = Served(ats=False, requests=0)
    found = [number for _, number in extended_capabilities(bench.edu.config.bytes)]
    assert found == [ExtendedId.ATS, ExtendedId.PRI, ExtendedId.PASID]
    assert bench.root.read_config(DEVICE, 0x100, 4) == 0x1081000F
    assert bench.status == PRI_STATUS.STOPPED
    plain = Bench("edu,slot=03.0")
    assert plain.root.read_config(DEVICE, 0x100, 4) == 0
    assert [number for _, number in extended_capabilities(Bench("virtio-rng,slot=03.0,ats=on").function("virtio-rng").config.bytes)] == [
        ExtendedId.ATS
    ]


def test_registers_that_only_such_a_device_has() -> None:
    edu = Bench("edu,slot=03.0").function("edu")
    edu.write_bar(0, Register.PASID, 8, 5)
    assert (edu.read_bar(0, Register.PASID, 8), edu.read_bar(0, Register.RESULT, 8)) == (-1, -1)
    edu = Served().edu
    edu.write_bar(0, Register.PASID, 4, 5)
    assert (edu.read_bar(0, Register.PASID, 8), edu.read_bar(0, Register.RESULT, 8)) == (5, 0)


@pytest.mark.parametrize("devices", [("edu,express=off,ats=on",), ("pci-bridge,id=b", "edu,bus=b,ats=on")])
def test_it_needs_express(devices: tuple[str, ...]) -> None:
    with pytest.raises(DeviceError, match="ats=on of device edu needs PCI Express"):
        Bench(*devices)


# Translations


def test_a_translation_is_asked_for_once() -> None:
    bench = Served()
    bench.give({IOVA: DATA, IOVA + 0x1000: DATA + 0x9000}, I=1)
    assert bench.sends(b"across two pages", IOVA + 0xFF8) == Result.DONE
    assert bench.ram.read(DATA + 0xFF8, 8) + bench.ram.read(DATA + 0x9000, 8) == b"across two pages"
    assert bench.sends(b"and once more", IOVA + 0xFF8) == Result.DONE
    assert bench.requests == 2
    assert (bench.stale, bench.events()) == ([], [])
    assert [(one.address, one.attributes.translated) for one in bench.told[-2:]] == [(IOVA + 0xFF8, True), (IOVA + 0x1000, True)]


@pytest.mark.parametrize("strict", [False, True])
def test_a_forgotten_invalidation_is_told(strict: bool) -> None:
    bench = Served(strict=strict)
    root = bench.give({IOVA: DATA}, I=1)
    bench.sends(b"one")
    bench.ram.write_u64(bench.leaf_of(root, IOVA), DATA + 0x1000 | PTE.PR | PTE.IR | PTE.IW)
    bench.sends(b"two")
    assert bench.ram.read(DATA, 3) == b"two"
    (text,) = bench.stale
    assert text == (
        "edu 00:03.0 uses a translation of its own that its tables no longer have: at 0x345000 it reaches 0x800000, they lead to "
        "0x801000; INVALIDATE_IOTLB_PAGES was forgotten"
    )
    bench.issue(CommandCode.INVALIDATE_IOMMU_PAGES, DomainID=7, Address=IOVA >> 12)
    bench.invalidate(IOVA + 0x1000, 0)
    bench.wait()
    bench.sends(b"two")
    assert len(bench.stale) == 2, "another page's"
    bench.invalidate(IOVA, 0)
    bench.wait()
    bench.sends(b"new")
    assert bench.ram.read(DATA + 0x1000, 3) == b"new"
    assert len(bench.stale) == 2


def test_completion_waits_for_the_device() -> None:
    """It forgets at once, and says so a moment later."""
    bench = Served()
    bench.give({IOVA: DATA}, I=1)
    bench.sends(b"x")
    bench.invalidate()
    bench.issue(CommandCode.COMPLETION_WAIT, Store=1, StoreAddress=0x490000 >> 3, StoreData=1)
    bench.pass_time(2001)
    assert bench.edu.state()["translations"] == 0
    assert bench.ram.read_u64(0x490000) == 0
    bench.commands_done()
    assert bench.ram.read_u64(0x490000) == 1
    assert bench.events() == []


def test_who_sleeps_does_not_answer() -> None:
    bench = Served()
    bench.control(CONTROL.make(InvTimeOut=1))
    at = next(at for at, number in ((one.offset, one.id) for one in bench.edu.capabilities) if number == 1)
    bench.root.write_config(DEVICE, at + 4, 2, 3)
    bench.invalidate()
    bench.pass_time(10_000_000)
    bench.pass_time(10_000_000)
    assert bench.event().code == EventCode.IOTLB_INV_TIMEOUT
    bench.wait()


def test_a_reset_forgets_and_answers_nothing() -> None:
    bench = Served()
    bench.control(CONTROL.make(InvTimeOut=1))
    bench.give({IOVA: DATA}, I=1)
    bench.sends(b"x")
    bench.invalidate()
    bench.pass_time(2001)
    bench.edu.function_level_reset()
    assert not bench.config(ExtendedId.ATS, ATS.offset_of("control"))
    bench.pass_time(10_000_000)
    bench.pass_time(10_000_000)
    assert bench.event().code == EventCode.IOTLB_INV_TIMEOUT


def test_turning_it_off_forgets() -> None:
    """And addresses go untranslated then."""
    bench = Served(requests=0)
    root = bench.give({IOVA: DATA}, I=1)
    bench.sends(b"one")
    bench.turn_on(False)
    bench.ram.write_u64(bench.leaf_of(root, IOVA), 0)
    assert bench.sends(b"two") == Result.ABORTED
    assert bench.event().flags == {"RW"}
    assert bench.read("00:03.0", 6, 2) & STATUS.RECEIVED_MASTER_ABORT
    bench.turn_on()
    assert bench.sends(b"two") == Result.NOT_MAPPED


def test_rights_of_answers() -> None:
    """A page that may be read is asked for anew once it is to be written; faults of requests are told to the device alone."""
    bench = Served(requests=0)
    root = bench.give({IOVA: DATA}, rights=PTE.IR, I=1)
    bench.start(IOVA, write=False)
    assert bench.result[0] == Result.DONE
    assert bench.sends(b"x") == Result.NOT_MAPPED
    assert bench.result[1] == IOVA
    assert bench.sends(b"x", IOVA + 0x10) == Result.NOT_MAPPED
    assert bench.requests == 3, "a right that is missing is asked for each time"
    assert not bench.read("00:03.0", 6, 2) & STATUS.RECEIVED_MASTER_ABORT
    bench.ram.write_u64(bench.leaf_of(root, IOVA), DATA | PTE.PR | PTE.IR | PTE.IW)
    assert bench.sends(b"x") == Result.DONE
    assert bench.requests == 4
    assert bench.sends(b"x", IOVA + 0x1000) == Result.NOT_MAPPED
    assert bench.events() == []


def test_dirty_bits_are_set_where_a_write_is_asked_for() -> None:
    bench = Served()
    root = bench.give({IOVA: DATA}, I=1, HAD=3)
    leaf = bench.leaf_of(root, IOVA)
    bench.start(IOVA, write=False)
    assert (bench.ram.read_u64(leaf) & PTE.A, bench.ram.read_u64(leaf) & PTE.D) == (PTE.A, 0)
    bench.sends(b"x")
    assert bench.ram.read_u64(leaf) & PTE.D
    assert bench.requests == 2


def test_pages_for_untranslated_requests_only() -> None:
    bench = Served()
    root = bench.give({IOVA: DATA}, I=1)
    bench.ram.write_u64(bench.leaf_of(root, IOVA), DATA | PTE.PR | PTE.IR | PTE.IW | PTE.U)
    assert bench.sends(b"x") == Result.DONE
    assert not bench.told[-1].attributes.translated
    assert bench.edu.state()["translations"] == 0


def test_a_large_page_is_one_translation() -> None:
    bench = Served()
    root = bench.host({0: 0}, 2)
    bench.ram.write_u64(root, 0x800000 | PTE.PR | PTE.IR | PTE.IW)
    bench.entry(V=1, TV=1, Mode=2, PageTableRoot=root >> 12, IR=1, IW=1, I=1)
    bench.sends(b"low", 0x1000)
    bench.sends(b"high", 0x1FF000)
    assert (bench.ram.read(0x801000, 3), bench.ram.read(0x9FF000, 4), bench.requests) == (b"low", b"high", 1)
    bench.invalidate(0x1FF000, 0)
    bench.wait()
    assert bench.edu.state()["translations"] == 0, "a part of it was named"


def test_a_device_that_gets_no_translations() -> None:
    bench = Served()
    bench.give({IOVA: DATA})
    assert bench.sends(b"x") == Result.ABORTED
    event = bench.event()
    assert (event.code, event.type, set(event.flags)) == (EventCode.INVALID_DEVICE_REQUEST, 0, {"TR"})
    bench.put("control", 0)
    assert bench.sends(b"x") == Result.ABORTED, "an IOMMU that is off translates for nobody (2.1.3.1)"


def test_translated_addresses_need_i() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1)
    bench.sends(b"x")
    bench.give({IOVA: DATA})
    assert bench.sends(b"y") == Result.ABORTED
    assert bench.stale[0].endswith("they refuse it: I, V or TV is 0: the device gets no translations; ATS was left on in the device")
    event = bench.event()
    assert (event.code, event.type, event.address) == (EventCode.INVALID_DEVICE_REQUEST, 1, DATA)


def test_who_claims_to_have_translated_is_believed() -> None:
    """With I; what a DEV or SKINIT denies is denied nevertheless (tests/iommu/test_with_dev.py)."""
    bench = Served()
    translated = Attributes(translated=True)
    bench.give({IOVA: DATA}, I=1)
    bench.dma.write(DEVICE, 0x700000, b"anywhere", translated)
    assert bench.ram.read(0x700000, 8) == b"anywhere"
    bench.dma.write(DEVICE, 0xFEE00000, bytes((0x41, 0, 0, 0)), translated)
    assert bench.vectors == [0x41], "an interrupt all the same (2.1.4.2)"
    bench.give({IOVA: DATA})
    with pytest.raises(DmaError, match="said to be translated"):
        bench.dma.read(DEVICE, 0x700000, 8, translated)
    bench.put("device_table_base", 0x200000)
    with pytest.raises(DmaError, match="ends before"):
        bench.dma.read(RequesterId(0x200), 0x700000, 8, translated)


# Page requests


def test_a_page_is_asked_for_and_the_transfer_goes_on() -> None:
    bench = Served()
    root = bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.ram.write_u64(bench.leaf_of(root, IOVA), 0)
    bench.start(IOVA + 0x10, write=True, data=b"late")
    assert bench.busy
    assert "page request 0, 0x345000" in str(bench.edu.state()["waits"])
    asked = bench.page_request()
    assert (asked["Address"], asked["DeviceID"], asked["WP"], asked["RP"], asked["GN"]) == (IOVA, DEVICE, 1, 0, 0)
    assert asked["PPRTag"] == 1 << 9, "the last of its group"
    bench.ram.write_u64(bench.leaf_of(root, IOVA), DATA | PTE.PR | PTE.IR | PTE.IW)
    bench.complete(asked["PPRTag"])
    assert (bench.busy, bench.result[0]) == (False, Result.DONE)
    assert bench.ram.read(DATA + 0x10, 4) == b"late"
    assert (bench.events(), bench.stale) == ([], [])


def test_pages_of_a_transfer_are_a_group() -> None:
    """One answer for both; with one credit alone, one after the other."""
    bench = Served()
    root = bench.give({IOVA: DATA, IOVA + 0x1000: DATA + 0x1000}, I=1, PPR=1)
    leaf = bench.leaf_of(root, IOVA)
    before = bench.ram.read(leaf, 16)
    bench.ram.write(leaf, bytes(16))
    bench.start(IOVA + 0xFFE, write=True, data=b"both")
    assert bench.get("ppr_tail") == 32
    found = [int.from_bytes(bench.ram.read(PPR_AT + at, 16), "little") for at in (0, 16)]
    assert [(PPR_RECORD.get(one, "Address"), PPR_RECORD.get(one, "PPRTag")) for one in found] == [(IOVA, 0), (IOVA + 0x1000, 1 << 9)]
    bench.ram.write(leaf, before)
    bench.complete(0)
    assert bench.result[0] == Result.DONE
    assert bench.ram.read(DATA + 0xFFE, 4) == b"both"
    bench.put("ppr_head", 32)
    bench.config(ExtendedId.PRI, PRI.offset_of("allocation"), 1, 4)
    bench.ram.write(leaf, bytes(16))
    bench.invalidate()
    bench.wait()
    bench.start(IOVA + 0xFFE, write=True, data=b"both")
    assert bench.page_request()["PPRTag"] == 1 << 9 | 1
    bench.ram.write(leaf, before[:8])
    bench.complete(1)
    asked = bench.page_request()
    assert (asked["Address"], asked["PPRTag"], bench.busy) == (IOVA + 0x1000, 1 << 9 | 2, True)


def test_a_page_that_is_not_there_after_all_is_asked_for_again() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.start(IOVA + 0x1000, write=False)
    for group in (0, 1, 2):
        asked = bench.page_request()
        assert asked["PPRTag"] == 1 << 9 | group
        bench.complete(group)
    assert bench.busy


@pytest.mark.parametrize(("response", "result", "failed"), [
    (PageResponse.INVALID, Result.INVALID, 0), (PageResponse.FAILURE, Result.FAILED, PRI_STATUS.FAILURE),
    (7, Result.FAILED, PRI_STATUS.FAILURE),
])  # fmt: skip
def test_other_answers(response: int, result: Result, failed: int) -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.start(IOVA + 0x1000, write=True, data=b"x")
    bench.complete(0, response)
    assert (bench.busy, bench.result, bench.status) == (False, (result, IOVA + 0x1000), failed)
    bench.start(IOVA + 0x1000, write=True, data=b"x")
    assert bench.busy == (not failed), "behind a failure there are no requests"
    bench.config(ExtendedId.PRI, PRI.offset_of("status"), PRI_STATUS.FAILURE)
    assert not bench.status


def test_an_answer_to_nothing() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.complete(5)
    assert bench.status == PRI_STATUS.UNEXPECTED


def test_as_many_requests_as_software_allows() -> None:
    bench = Served(requests=0)
    bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.config(ExtendedId.PRI, PRI.offset_of("control"), PRI_CONTROL.ENABLE)
    assert bench.sends(b"x", 0x1000) == Result.NOT_MAPPED
    assert bench.get("ppr_tail") == 0


def test_requests_that_are_reset_are_not_waited_for() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1, PPR=1)
    bench.start(0x1000, write=True, data=b"x")
    control = PRI.offset_of("control")
    assert not bench.config(ExtendedId.PRI, control, PRI_CONTROL.ENABLE | PRI_CONTROL.RESET) & PRI_CONTROL.RESET
    assert bench.busy
    bench.config(ExtendedId.PRI, control, 0)
    assert not bench.status & PRI_STATUS.STOPPED, "one is under way"
    bench.config(ExtendedId.PRI, control, PRI_CONTROL.RESET)
    assert (bench.busy, bench.result[0], bench.status) == (False, Result.FAILED, PRI_STATUS.STOPPED)


def test_page_requests_that_the_iommu_does_not_take() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1)
    bench.start(0x1000, write=True, data=b"x")
    (record,) = bench.events()
    assert (record >> 60 & 15, record >> 64, bench.busy) == (EventCode.INVALID_PPR_REQUEST, 0x1000, True)
    bench.complete(0, PageResponse.INVALID)
    assert not bench.busy, "software answers all the same (2.5.10)"


# PASIDs


@pytest.mark.parametrize("ats", [False, True])
def test_requests_of_a_process(ats: bool) -> None:
    bench = Served(ats=ats, pasid=True)
    guest = Guest(bench, nested=True, I=1)
    bench.edu.write_bar(0, Register.PASID, 8, WITH_PASID | PASID)
    assert bench.sends(b"process", GVA + 8) == Result.DONE
    assert bench.ram.read(guest.page + guest.shift + 8, 7) == b"process"
    assert guest.get(*guest.leaf) & ENTRY.D
    bench.edu.write_bar(0, Register.PASID, 8, PASID)
    bench.start(GVA, write=False)
    assert bench.busy == ats, "the same address without the PASID is another"


def test_without_the_capability_no_pasid_is_sent() -> None:
    bench = Served(ats=False)
    bench.give({IOVA: DATA})
    bench.edu.write_bar(0, Register.PASID, 8, WITH_PASID | PASID)
    assert bench.sends(b"x") == Result.DONE
    assert bench.told[-1].attributes.pasid is None


def test_a_process_page_is_asked_for() -> None:
    bench = Served(pasid=True)
    guest = Guest(bench, nested=True, I=1, PPR=1)
    before = guest.get(*guest.leaf)
    guest.put(*guest.leaf, 0)
    bench.edu.write_bar(0, Register.PASID, 8, WITH_PASID | PASID)
    bench.start(GVA, write=True, data=b"late")
    asked = bench.page_request()
    assert (asked["GN"], asked["PASID_15_0"], asked["US"], asked["Address"]) == (1, PASID, 1, GVA)
    guest.put(*guest.leaf, before)
    bench.complete(asked["PPRTag"], PASID=PASID, GN=1)
    assert bench.ram.read(guest.page + guest.shift, 4) == b"late"


def test_invalidations_of_a_process() -> None:
    bench = Served(pasid=True)
    Guest(bench, nested=True, I=1)
    bench.edu.write_bar(0, Register.PASID, 8, WITH_PASID | PASID)
    bench.sends(b"x", GVA)
    parts = {"PASID_15_8": PASID >> 8 & 0xFF, "PASID_7_0": PASID & 0xFF}
    bench.invalidate(GVA, 0, GN=1, PASID_15_8=0, PASID_7_0=1)
    bench.invalidate(GVA + 0x1000, 0, GN=1, **parts)
    bench.wait()
    assert bench.edu.state()["translations"] == 1
    bench.invalidate(GVA, 0, GN=1, **parts)
    bench.wait()
    assert bench.edu.state()["translations"] == 0
    bench.sends(b"x", GVA)
    bench.invalidate(0x5000, 0)
    bench.wait()
    assert bench.edu.state()["translations"] == 0, "what a host's page is under is not known"


def test_supervisors_and_execution_are_apart() -> None:
    """A page of supervisors that one of them had translated is no user's."""
    bench = Served(pasid=True, requests=0)
    guest = Guest(bench, nested=False, I=1)
    guest.put(*guest.leaf, guest.page | ENTRY.P | ENTRY.W | ENTRY.NX)
    register = WITH_PASID | PASID
    bench.edu.write_bar(0, Register.PASID, 8, register | 1 << 30)
    assert bench.sends(b"x", GVA) == Result.DONE
    bench.edu.write_bar(0, Register.PASID, 8, register)
    assert bench.sends(b"x", GVA) == Result.NOT_MAPPED
    bench.edu.write_bar(0, Register.PASID, 8, register | 3 << 29)
    bench.start(GVA, write=False)
    assert bench.result == (Result.NOT_MAPPED, GVA)
    bench.config(ExtendedId.PASID, PASIDS.offset_of("control"), PASID_CONTROL.ENABLE | PASID_CONTROL.PRIVILEGED)
    bench.start(GVA, write=False)
    assert bench.result[0] == Result.DONE, "execution is not asked for by who may not"


def test_a_root_port_may_block_translated_addresses() -> None:
    """ACS translation blocking; else the port's access control has nothing to do."""
    bench = Bench("bridge,slot=04.0,id=port", "edu,bus=port,dma-mask=64,ats=on")
    port, edu = bench.function("bridge"), bench.function("edu")
    for one in (port, edu):
        bench.command(str(one.address))
    bench.root.write_config(edu.requester, 0x106, 2, ATS_CONTROL.ENABLE)
    bench.give({IOVA: DATA}, device=edu.requester, I=1)
    assert port.extended
    assert bench.root.read_config(port.requester, 0x100, 4) == 0x1000D
    edu.dma_write(IOVA, b"through")
    assert bench.ram.read(DATA, 7) == b"through"
    bench.root.write_config(port.requester, 0x106, 2, 0xFFFF)
    assert bench.root.read_config(port.requester, 0x106, 2) == bench.root.read_config(port.requester, 0x104, 2) == 0x1F
    with pytest.raises(DmaError, match=r"the bridge 00:04.0 blocks translation requests"):
        edu.dma_write(IOVA, b"refused")
    assert bench.events() == []
    bench.root.write_config(edu.requester, 0x106, 2, 0)
    edu.dma_write(IOVA, b"not translated")
    assert bench.ram.read(DATA, 14) == b"not translated"


def test_bus_mastering_is_needed() -> None:
    bench = Served()
    bench.give({IOVA: DATA}, I=1)
    bench.command("00:03.0", 0, COMMAND.BUS_MASTER)
    assert bench.sends(b"x") == Result.ABORTED
    assert bench.requests == 0
