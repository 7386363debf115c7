"""The GDB remote serial protocol, independent of any emulator.

An emulator implements `target.Target`, and whichever optional capabilities of `gdbstub.target` it can; `server.Server`
offers it to gdb and lldb. `gdbstub.example` is a complete target in one file.
"""
