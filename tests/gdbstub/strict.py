"""The example target, which fails on any call that the protocols of `gdbstub.target` rule out."""

from __future__ import annotations

from collections.abc import Mapping

from gdbstub.example import Example
from gdbstub.target import Action, BreakpointKind, ThreadId


class Strict(Example):
    """The session reports such a failure as an internal error."""

    def _alive(self, thread: ThreadId) -> None:
        assert thread.pid in self.attached, thread
        assert thread.tid in self.processes[thread.pid].cpus, thread

    def read_registers(self, thread: ThreadId) -> bytes:
        self._alive(thread)
        return super().read_registers(thread)

    def write_registers(self, thread: ThreadId, block: bytes) -> None:
        self._alive(thread)
        assert len(block) == self.description(thread.pid).block_size
        super().write_registers(thread, block)

    def read_register(self, thread: ThreadId, number: int) -> bytes | None:
        self._alive(thread)
        assert 0 <= number < len(self.description(thread.pid).registers)
        return super().read_register(thread, number)

    def write_register(self, thread: ThreadId, number: int, value: bytes) -> None:
        self._alive(thread)
        assert len(value) == self.description(thread.pid).size(number)
        super().write_register(thread, number, value)

    def read_memory(self, thread: ThreadId, address: int, length: int) -> bytes:
        self._alive(thread)
        assert 0 <= address <= address + length <= 1 << 64
        assert length <= 0x20000
        return super().read_memory(thread, address, length)

    def write_memory(self, thread: ThreadId, address: int, data: bytes) -> None:
        self._alive(thread)
        assert data
        assert 0 <= address <= address + len(data) <= 1 << 64
        super().write_memory(thread, address, data)

    def insert_breakpoint(self, kind: BreakpointKind, address: int, length: int, thread: ThreadId) -> None:
        self._alive(thread)
        assert (kind, length) not in self.points.get((thread.pid, address), ())
        super().insert_breakpoint(kind, address, length, thread)

    def remove_breakpoint(self, kind: BreakpointKind, address: int, length: int, pid: int) -> None:
        assert (kind, length) in self.points[pid, address]
        super().remove_breakpoint(kind, address, length, pid)

    def resume(self, actions: Mapping[ThreadId, Action]) -> None:
        assert bool(actions) == bool(self.attached)
        for thread in actions:
            self._alive(thread)
        super().resume(actions)

    def _space(self, pid: int, index: int) -> None:
        assert pid in self.attached, pid
        assert 0 <= index < len(self.spaces(pid))

    def chosen_space(self, pid: int) -> int:
        assert pid in self.attached, pid
        return super().chosen_space(pid)

    def choose_space(self, pid: int, index: int) -> None:
        self._space(pid, index)
        super().choose_space(pid, index)

    def read_space(self, thread: ThreadId, index: int, address: int, length: int) -> bytes:
        self._alive(thread)
        self._space(thread.pid, index)
        assert 0 <= address <= address + length <= 1 << 64
        return super().read_space(thread, index, address, length)

    def write_space(self, thread: ThreadId, index: int, address: int, data: bytes) -> None:
        self._alive(thread)
        self._space(thread.pid, index)
        assert data
        assert 0 <= address <= address + len(data) <= 1 << 64
        super().write_space(thread, index, address, data)
