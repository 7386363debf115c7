"""The GDB remote serial protocol, independent of any emulator."""
