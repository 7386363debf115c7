from introspect.smm import SMM_IO, SMM_SAVE, SMM_SAVE_OFFSET


def test_offsets_are_those_of_the_manual() -> None:
    offsets = {name: SMM_SAVE_OFFSET + SMM_SAVE.offset_of(name) for name in SMM_SAVE.fields}
    wanted = {
        "es.selector": 0xFE00, "gs.base": 0xFE58, "gdtr.limit": 0xFE64, "gdtr.base": 0xFE68, "ldtr.selector": 0xFE70,
        "idtr.base": 0xFE88, "tr.limit": 0xFE94, "io_rip": 0xFEA0, "io_rdi": 0xFEB8, "io": 0xFEC0, "io_restart": 0xFEC8,
        "auto_halt_restart": 0xFEC9, "efer": 0xFED0, "svm_state": 0xFED8, "vmcb": 0xFEE0, "revision": 0xFEFC,
        "smbase": 0xFF00, "g_pat": 0xFF20, "host_cr0": 0xFF40, "cr4": 0xFF48, "cr0": 0xFF58, "dr6": 0xFF68, "rip": 0xFF78,
        "r15": 0xFF80, "r8": 0xFFB8, "rdi": 0xFFC0, "rsp": 0xFFD8, "rcx": 0xFFF0, "rax": 0xFFF8,
    }  # fmt: skip
    assert {name: offsets[name] for name in wanted} == wanted


def test_the_io_dword() -> None:
    assert SMM_SAVE.describe("io", SMM_IO.make(VALID=1, SZ8=1, PORT=0xB2)) == "0xb20012 VALID SZ8 PORT=0xb2"
