"""Devices and the memory map."""
