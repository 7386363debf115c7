"""What one stop of each kind costs, in microseconds: instructions the engine stops before, and round trips of a guest.

No image of examples/ does all of these, so a flat one is put together here: a host that loops over one instruction,
or over VMRUN of a guest that loops over one.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from struct import pack

from introspect.exits import ExitCode
from introspect.registers import CR0, EFER
from introspect.vmcb import MISC_CTL, VMCB
from vmdbg.machine import Config, Machine

from .measure import BenchmarkError, Report, Times, finish, main

COLUMNS = (("who", ""), ("what", ""), ("native us", ".1f"), ("python us", ".1f"))
BASE = 0x200000
VMCB_PAGE, HSAVE, PML4, PDPT, DIRECTORY = (BASE + 0x1000 * page for page in range(1, 6))
IOPM, MSRPM, GUEST = BASE + 0x6000, BASE + 0x9000, BASE + 0xB000

HOST = {
    "CPUID": "0fa2",
    "RDTSC": "0f31",
    "RDMSR of EFER": "b9 800000c0 0f32",
    "VMSAVE": "b8 00102000 0f01db",
    "IN from a port of no device": "e480",
    "IN from the PIC": "e421",
    "load from the local APIC": "b9 2000e0fe 8b01",
}
"""By name, 64-bit code."""
GUESTS = {
    "VMMCALL": ("0f01d9", ExitCode.VMMCALL),
    "CPUID": ("0fa2", ExitCode.CPUID),
    "IN": ("e480", ExitCode.IOIO),
    "RDMSR": ("0f32", ExitCode.MSR),
    "HLT": ("f4", ExitCode.HLT),
    "nested page fault": ("a1 00000040", ExitCode.NPF),
}
"""By name: 32-bit code of one instruction, and its EXITCODE."""


def _host(body: str, rounds: int) -> bytes:
    """SVM on, `rounds` times the body, the end."""
    prologue = "b9 800000c0 0f32 0d 00100000 0f30" + "b9 170101c0 b8" + pack("<I", HSAVE).hex() + "31d2 0f30"
    code = bytes.fromhex(prologue) + b"\xbd" + pack("<I", rounds)  # mov ebp, rounds
    loop = bytes.fromhex(body) + b"\xff\xcd"  # dec ebp
    return code + loop + b"\x0f\x85" + pack("<i", -len(loop) - 6) + bytes.fromhex("31c0 e7f4 f4")  # jnz; out F4, 0; hlt


def host_image(instruction: str, rounds: int) -> bytes:
    return _host(instruction, rounds)


def guest_image(instruction: str, rounds: int) -> bytes:
    """The host moves the guest's RIP over the instruction after each exit, as hypervisors do."""
    guest = bytes.fromhex(instruction)
    step = "4883 0425" + pack("<IB", VMCB_PAGE + VMCB.offset_of("rip"), len(guest)).hex()  # add qword [rip], length
    host = _host("b8" + pack("<I", VMCB_PAGE).hex() + "0f01d8 0f01dc" + step, rounds)  # mov eax; vmrun; stgi
    fields = {
        "intercept_misc1": 1 << 18 | 1 << 24 | 1 << 27 | 1 << 28, "intercept_misc2": 3, "iopm_base_pa": IOPM,
        "msrpm_base_pa": MSRPM, "guest_asid": 1, "misc_ctl": MISC_CTL.np_enable, "n_cr3": PML4,
        "g_pat": 0x0007040600070406,
        "efer": EFER.SVME, "cr0": CR0.PE | CR0.ET, "dr6": 0xFFFF0FF0, "dr7": 0x400, "rflags": 2, "rip": GUEST,
        "cs.selector": 8, "cs.attrib": 0xC9B, "cs.limit": 0xFFFFFFFF,
    }  # fmt: skip
    for name in ("ds", "es", "ss"):
        fields |= {f"{name}.selector": 0x10, f"{name}.attrib": 0xC93, f"{name}.limit": 0xFFFFFFFF}
    tables = pack("<Q4088x", PDPT | 7) + pack("<Q4088x", DIRECTORY | 7)
    tables += pack("<512Q", *(page << 21 | 0x87 for page in range(512)))
    maps = b"\xff" * 0x5000
    loop = guest + b"\xeb" + pack("<b", -len(guest) - 2)
    return host.ljust(0x1000, b"\0") + bytes(VMCB.encode(fields)) + bytes(0x1000) + tables + maps + loop


def seconds(image: bytes, code: int, *, python: bool) -> float:
    machine = Machine(image, Config(memory=64 << 20, flat_address=BASE, mode="long", python_runtime=python))
    start = time.perf_counter()
    finish(machine)
    taken = time.perf_counter() - start
    if machine.exit_status != 1:
        raise BenchmarkError(f"the image ended with status {machine.exit_status}: {machine.ended}")
    if code and (found := VMCB.read(machine.ram.view[VMCB_PAGE : VMCB_PAGE + 0x1000], "exitcode")) != code:
        raise BenchmarkError(f"the guest's last EXITCODE is {found:#x}, not {code:#x}")
    return taken


def measure(quick: bool) -> Report:
    report = Report("exits", COLUMNS)
    count, rounds = (500, 1) if quick else (20_000, 3)
    work = [("host", name, host_image(code, count), 0) for name, code in HOST.items()]
    work += [("guest", name, guest_image(code, count), int(exit_code)) for name, (code, exit_code) in GUESTS.items()]
    for who, what, image, exit_code in work:
        peers = {
            "native": partial(seconds, image, exit_code, python=False),
            "python": partial(seconds, image, exit_code, python=True),
        }
        times = Times(peers, rounds)
        report.rows.append(
            {"who": who, "what": what} | {f"{name} us": 1e6 * times.median(name) / count for name in peers}
        )
    report.remarks.append("host: one stop each time; guest: VMRUN, #VMEXIT and the loop around them.")
    return report


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
