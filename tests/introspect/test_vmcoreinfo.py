"""A kernel's VMCOREINFO is found on its page, and told from those of others by the kernel's own page tables."""

from __future__ import annotations

from introspect.sources import BytesMemory
from introspect.sources.notes import make_note
from introspect.vmcoreinfo import find_vmcoreinfo

KERNEL = 0xFFFF_FFFF_8000_0000


def information(release: str, swapper: int = KERNEL + 0x1000, base: int = 0x100000) -> bytes:
    return f"OSRELEASE={release}\nSYMBOL(swapper_pg_dir)={swapper:x}\nNUMBER(phys_base)={base}\n".encode()


def page(contents: bytes) -> bytes:
    return make_note(b"VMCOREINFO", 0, contents).ljust(0x1000, b"\0")


def test_the_note_on_a_page() -> None:
    memory = BytesMemory({0x1000: bytes(0x1000) + page(information("6.1")) + bytes(0x1000)})
    assert find_vmcoreinfo(memory, lambda linear: 0x101000) == information("6.1")
    assert find_vmcoreinfo(memory, lambda linear: None) == information("6.1")


def test_a_guests_note_is_not_the_hosts() -> None:
    memory = BytesMemory({0: page(information("guest", base=0x900000)) + page(information("host"))})
    assert find_vmcoreinfo(memory, lambda linear: 0x101000 if linear == KERNEL + 0x1000 else None) == information("host")
    assert find_vmcoreinfo(memory, lambda linear: 0x555000) == b""


def test_what_is_none() -> None:
    for contents in (b"", b"x" * 0x2000, page(b"RELEASE=1"), page(information("6"))[:20].ljust(0x1000, b"\xff"),
                     b"\0" * 8 + page(information("6"))):  # fmt: skip
        assert find_vmcoreinfo(BytesMemory({0: contents.ljust(0x2000, b"\0")}), lambda linear: None) == b""
