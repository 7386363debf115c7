"""docs/gdb.md: what debuggers may ask of the stub, packet by packet, and the tests that show it.

python -m tests.gdbstub.rows > docs/gdb.md
"""

from __future__ import annotations

from binascii import hexlify
from collections.abc import Iterator
from typing import NamedTuple

from gdbstub.example import CODE, DATA


class Row(NamedTuple):
    """One capability.  Each packet stands with an example that the stub of `gdbstub.example` answers, neither with nothing nor
    with an error; an example may need others before it, separated by spaces.  A packet without a reply has ""."""

    what: str
    packets: dict[str, str]
    """Name, as the session looks it up, to the example."""
    tests: tuple[str, ...]
    """`file::test`, below tests/."""


def _hex(text: str) -> str:
    return hexlify(text.encode()).decode()


_C, _D = f"{CODE:x}", f"{DATA:x}"
_AT = f"{CODE + 4:x}"
_POINT = f"QTDP:1:{CODE + 4:016x}:E:0:0"
_FRAME = f"{_POINT} QTStart Z0,{CODE + 8:x},1 c QTFrame:0"

SECTIONS: dict[str, tuple[Row, ...]] = {
    "The connection": (
        Row("what each side can; packets of up to 128 KiB", {"qSupported": "qSupported:multiprocess+"}, (
            "gdbstub/test_session.py::test_what_is_offered_follows_from_what_the_target_can",
            "e2e/test_protocol.py::test_memory_in_bulk")),
        Row("no acknowledgements", {"QStartNoAckMode": "QStartNoAckMode"}, (
            "gdbstub/test_session.py::test_acknowledgments_and_retransmission", "e2e/test_protocol.py::test_memory_in_bulk")),
        Row("errors in words: `E.text` for gdb 16 and later, `E01;hex` for lldb",
            {"QEnableErrorStrings": "QEnableErrorStrings"}, (
            "gdbstub/test_session.py::test_errors_come_in_the_richest_form_the_client_takes",
            "e2e/test_protocol.py::test_errors_in_words")),
        Row("extended mode, and who stops: all together, or one by one (non-stop)", {
            "!": "!", "?": "?", "QNonStop": "QNonStop:1", "vStopped": "QNonStop:1 ? vStopped"}, (
            "gdbstub/test_nonstop.py::test_threads_are_resumed_and_stopped_one_by_one",
            "e2e/test_nonstop.py::test_one_guest_stands_still", "e2e/test_nonstop.py::test_the_hypervisor_stands_still",
            "e2e/test_nonstop_across.py::test_guests_under_a_hypervisor_in_a_guest")),
    ),
    "Inferiors and threads": (
        Row("one process for the hypervisor and each guest", {"vAttach": "vAttach;2", "D": "D;1", "qAttached": "qAttached:1"}, (
            "gdbstub/test_session.py::test_attach_and_detach_leave_the_others_alone",
            "e2e/test_inferiors.py::test_guests_come_and_go")),
        Row("run again, kill", {"vRun": "vRun;", "vKill": "vKill;1", "k": "", "R": ""}, (
            "gdbstub/test_session.py::test_kill_run_and_restart", "e2e/test_running.py::test_kill_and_run_again")),
        Row("threads, one for each CPU and vCPU", {
            "H": "Hgp1.1", "T": "Tp1.1", "qC": "qC", "qfThreadInfo": "qfThreadInfo", "qsThreadInfo": "qsThreadInfo",
            "qThreadExtraInfo": "qThreadExtraInfo,p1.1", "qXfer:threads": "qXfer:threads:read::0,1000"}, (
            "gdbstub/test_session.py::test_threads", "e2e/test_modes.py::test_two_processors")),
        Row("`info os processes`", {"qXfer:osdata": "qXfer:osdata:read:processes:0,1000"}, (
            "gdbstub/test_session.py::test_osdata_lists_every_inferior", "e2e/test_protocol.py::test_lists_and_files")),
        Row("threads that come and go are told", {"QThreadEvents": "QThreadEvents:1"}, (
            "gdbstub/test_nonstop.py::test_thread_events_when_all_stop_together", "e2e/test_locking.py::test_new_threads_are_told")),
        Row("relocated symbols", {"qXfer:libraries": "qXfer:libraries:read::0,1000"}, ("e2e/test_symbols.py::test_relocated_symbols",)),
        Row("symbols through the stub", {
            "qXfer:exec-file": "qXfer:exec-file:read:1:0,100", "vFile:setfs": "vFile:setfs:0",
            "vFile:open": f"vFile:open:{_hex('/example/program')},0,0",
            "vFile:pread": f"vFile:open:{_hex('/example/program')},0,0 vFile:pread:3,10,0",
            "vFile:fstat": f"vFile:open:{_hex('/example/program')},0,0 vFile:fstat:3",
            "vFile:stat": f"vFile:stat:{_hex('/example/program')}", "vFile:lstat": f"vFile:lstat:{_hex('/example/program')}",
            "vFile:close": f"vFile:open:{_hex('/example/program')},0,0 vFile:close:3"}, (
            "gdbstub/test_session.py::test_files_are_those_the_target_offers",
            "gdbstub/test_gdb.py::test_symbols_come_through_the_stub", "e2e/test_protocol.py::test_lists_and_files")),
    ),
    "Registers and memory": (
        Row("registers, described", {
            "qXfer:features": "qXfer:features:read:target.xml:0,1000", "g": "g", "G": "G", "p": "p10", "P": "P10=0010000000000000"}, (
            "gdbstub/test_session.py::test_registers", "e2e/test_modes.py::test_guests_of_other_modes")),
        Row("memory, as far as it can be read; 128 KiB at once", {
            "m": f"m{_C},8", "x": f"x{_C},8", "M": f"M{_D},1:5a", "X": f"X{_D},1:Z"}, (
            "gdbstub/test_session.py::test_reads_give_the_readable_prefix", "gdbstub/test_session.py::test_writes",
            "e2e/test_protocol.py::test_memory_in_bulk", "e2e/test_protocol.py::test_the_readable_part_of_a_range")),
        Row("`find`", {"qSearch": f"qSearch:memory:{_C};100;\x90"}, (
            "gdbstub/test_session.py::test_search", "e2e/test_protocol.py::test_memory_in_bulk")),
        Row("`compare-sections`", {"qCRC": f"qCRC:{_C},100"}, (
            "gdbstub/test_session.py::test_crc_is_gdbs", "e2e/test_protocol.py::test_memory_in_bulk")),
        Row("`info mem`: all linear addresses, since page tables change", {"qXfer:memory-map": "qXfer:memory-map:read::0,1000"}, (
            "gdbstub/test_session.py::test_documents_fit_together_and_end", "e2e/test_protocol.py::test_lists_and_files")),
    ),
    "Address spaces": (
        Row("memory by linear, guest-physical and system-physical address: lldb's extension, QEMU's packets, `monitor space`", {
            "jAddressSpacesInfo": "jAddressSpacesInfo", "qqemu.PhyMemMode": "qqemu.PhyMemMode",
            "Qqemu.PhyMemMode": "Qqemu.PhyMemMode:1"}, (
            "gdbstub/test_spaces.py::test_lldb_lists_them_and_reads_in_one",
            "gdbstub/test_spaces.py::test_qemus_mode_is_for_all_memory_packets_and_not_for_breakpoints",
            "e2e/test_spaces.py::test_three_names_of_one_byte")),
    ),
    "Breakpoints and watchpoints": (
        Row("breakpoints, software and hardware alike: nothing is written to memory", {"Z": f"Z0,{_C},1", "z": f"z0,{_C},1"}, (
            "gdbstub/test_resume.py::test_breakpoints", "e2e/test_breakpoints.py::test_before_paging_and_through_world_switches",
            "e2e/test_processes.py::test_a_user_breakpoint_and_one_of_the_kernel")),
        Row("watchpoints for writes, reads and both, of 1 to 4096 bytes at any address; pc behind the store",
            {"Z": f"Z2,{_D},8"}, (
            "e2e/test_watchpoints.py::test_each_store_stops_behind_itself",
            "e2e/test_watchpoints.py::test_any_length_and_alignment", "e2e/test_watchpoints.py::test_it_follows_the_page_tables",
            "e2e/test_watchpoints.py::test_the_processors_own_accesses", "e2e/test_watchpoints.py::test_thousands")),
        Row("by guest-physical and system-physical address (`monitor watch`), with the one who did it, devices too",
            {"qRcmd": f"qRcmd,{_hex('echo x')}"}, (
            "e2e/test_watchpoints.py::test_other_address_spaces", "e2e/test_watchpoints.py::test_a_device_is_named")),
        Row("ranges (`monitor break-range`: gdb sends none for x86)", {"qRcmd": f"qRcmd,{_hex('echo x')}"}, (
            "e2e/test_watchpoints.py::test_ranges",)),
    ),
    "Agent expressions": (
        Row("conditions and commands of breakpoints, evaluated in the stub; `dprintf-style agent`",
            {"Z": f"Z0,{_C},1;X3,220127;cmds:0,X3,220127"}, (
            "gdbstub/test_agent.py::test_what_gdb_sends", "e2e/test_agent.py::test_conditions", "e2e/test_agent_gdb.py::test_a_guest")),
        Row("tracepoints: defined, enabled, told again", {
            "QTinit": "QTinit", "QTDP": _POINT, "QTDPsrc": f"{_POINT} QTDPsrc:1:{_AT}:at:0:1:41", "QTDV": "QTDV:1:5:0:41",
            "QTEnable": f"{_POINT} QTEnable:1:{_AT}", "QTDisable": f"{_POINT} QTDisable:1:{_AT}", "QTro": f"QTro:{_C},{_D}",
            "qTP": f"{_POINT} qTP:1:{_AT}", "qTfP": f"{_POINT} qTfP", "qTsP": "qTsP", "qTfV": "qTfV", "qTsV": "qTsV",
            "qTV": "QTDV:1:5:0:41 qTV:1"}, (
            "gdbstub/test_tracepoints.py::test_definitions_are_told_again",
            "gdbstub/test_tracepoints.py::test_expressions_strings_and_variables",
            "gdbstub/test_tracepoints.py::test_enabled_and_disabled_while_it_runs")),
        Row("a trace: begun, ended, kept without a client; its buffer", {
            "QTStart": f"{_POINT} QTStart", "QTStop": "QTStop", "qTStatus": "qTStatus", "QTDisconnected": "QTDisconnected:1",
            "QTBuffer": "QTBuffer:circular:1", "qTBuffer": "qTBuffer:0,100", "QTNotes": "QTNotes:user:41;", "QTSave": ""}, (
            "gdbstub/test_tracepoints.py::test_the_buffer_is_bounded", "gdbstub/test_tracepoints.py::test_without_the_client",
            "gdbstub/test_tracepoints.py::test_the_buffer_is_read_as_trace_files_have_it")),
        Row("trace frames", {"QTFrame": _FRAME, "qXfer:traceframe-info": f"{_FRAME} qXfer:traceframe-info:read::0,1000"}, (
            "gdbstub/test_tracepoints.py::test_frames_are_found",
            "e2e/test_agent_gdb.py::test_tracepoints_in_hypervisor_and_guest")),
    ),
    "Running": (
        Row("continue, step, step over a range, each thread by itself", {
            "vCont?": "vCont?", "vCont": "vCont;s:p1.1;c", "c": f"Z0,{CODE + 4:x},1 c", "s": "s",
            "C": f"Z0,{CODE + 4:x},1 C05", "S": "S05"}, (
            "gdbstub/test_resume.py::test_actions_choose_threads", "gdbstub/test_resume.py::test_a_range_is_stepped_through",
            "e2e/test_running.py::test_steps_over_intercepted_instructions",
            "e2e/test_running.py::test_steps_pass_over_interrupts")),
        Row("QEMU's packets for what a step is", {
            "qqemu.sstepbits": "qqemu.sstepbits", "qqemu.sstep": "qqemu.sstep", "Qqemu.sstep": "Qqemu.sstep=7"}, (
            "gdbstub/test_nonstop.py::test_step_flags",)),
        Row("^C, also where it crosses a stop", {"vCtrlC": "vCtrlC"}, (
            "gdbstub/test_resume.py::test_interrupt_right_behind_continue_is_not_lost",
            "gdbstub/test_server.py::test_interrupts_are_seen_after_a_slice", "e2e/test_running.py::test_interrupts")),
    ),
    "lldb": (
        Row("who it talks to, threads and registers at once", {
            "qHostInfo": "qHostInfo", "qProcessInfo": "qProcessInfo", "QThreadSuffixSupported": "QThreadSuffixSupported",
            "QListThreadsInStopReply": "QListThreadsInStopReply", "jThreadsInfo": "jThreadsInfo",
            "qThreadStopInfo": "qThreadStopInfop1.1", "jThreadExtendedInfo": 'jThreadExtendedInfo:{"thread":1}]',
            "qStructuredDataPlugins": "qStructuredDataPlugins"}, (
            "gdbstub/test_session.py::test_lldb_packets", "gdbstub/test_lldb_packets.py::test_extended_information_of_a_thread",
            "e2e/test_lldb.py::test_a_session", "e2e/test_lldb.py::test_two_targets_of_one_lldb")),
        Row("detaching that leaves the machine stopped", {"qSupportsDetachAndStayStopped": "qSupportsDetachAndStayStopped:"}, (
            "gdbstub/test_lldb_packets.py::test_a_process_is_left_and_the_machine_stays_stopped",)),
        Row("registers one by one; saved and restored around calls", {
            "qRegisterInfo": "qRegisterInfo0", "QSaveRegisterState": "QSaveRegisterState",
            "QRestoreRegisterState": "QSaveRegisterState QRestoreRegisterState:1"}, (
            "gdbstub/test_lldb_packets.py::test_registers_one_by_one",
            "gdbstub/test_lldb_packets.py::test_saved_registers_are_restored_once_and_for_their_thread",
            "e2e/test_lldb.py::test_conditions_by_source_and_expressions_that_call")),
        Row("`memory region`", {"qMemoryRegionInfo": f"qMemoryRegionInfo:{_C}"}, ("gdbstub/test_session.py::test_lldb_packets",)),
    ),
}  # fmt: skip

_HEAD = """# What debuggers may ask

Made by `python -m tests.gdbstub.rows` from the table that `tests/gdbstub/test_rows.py` checks: every packet of the stub is here,
each is answered, and each test exists. Tests in `gdbstub/` run on the library's example target, those in `e2e/` on machines
with stock gdb (13 and 18) and lldb. How fast it all is stands in [performance.md](performance.md).
"""


def lines() -> Iterator[str]:
    yield _HEAD
    for section, rows in SECTIONS.items():
        yield f"## {section}\n"
        yield "| what | packets | tests |\n| --- | --- | --- |"
        for row in rows:
            packets = ", ".join(f"`{name}`" for name in row.packets)
            tests = "<br>".join(test.replace("::test_", ": ").replace("test_", "").replace("_", " ") for test in row.tests)
            yield f"| {row.what} | {packets} | {tests} |"
        yield ""


def document() -> str:
    return "\n".join(lines())


if __name__ == "__main__":
    print(document(), end="")
