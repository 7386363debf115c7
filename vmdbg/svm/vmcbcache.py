"""The processor's copy of VMCBs, which clean bits let it use (APM2 15.15), as far as hardware may go.

Without it (the default) each VMRUN reads the whole VMCB, which is always right.  With it, a field whose clean bit is set is
never read again on the CPU that ran the VMCB last: a hypervisor that changes a field and forgets to clear its bit runs with
the old value here, as it would there on a bad day.
"""

from __future__ import annotations

from introspect.vmcb import VMCB

MOST = 64
"""VMCBs that one CPU remembers."""

_CACHED = [
    (1 << field.clean, field.name, slice(field.offset, field.offset + field.size)) for field in VMCB if field.clean is not None
]  # fmt: skip
_CLEAN = VMCB.offset_of("vmcb_clean")
_STORED = [where for _, name, where in _CACHED if where.start >= 0x400 or name == "v_intr"]
"""What #VMEXIT writes into a VMCB: cache and memory agree there behind it."""


class VmcbCache:
    """The VMCBs that one CPU has run."""

    def __init__(self) -> None:
        self._held: dict[int, bytearray] = {}

    def load(self, vmcb: int, view: memoryview) -> tuple[memoryview, list[str]]:
        """The VMCB at `view` as VMRUN sees it, and the fields for which that is not what memory holds."""
        loaded = bytearray(view)
        held = self._held.pop(vmcb, None)
        stale = []
        clean = int.from_bytes(loaded[_CLEAN : _CLEAN + 4], "little")
        if held is not None and clean:
            for bit, name, where in _CACHED:
                if clean & bit and held[where] != loaded[where]:
                    stale.append(name)
                    loaded[where] = held[where]
        if len(self._held) >= MOST:
            del self._held[next(iter(self._held))]
        self._held[vmcb] = loaded
        return memoryview(loaded), stale

    def store(self, vmcb: int, view: memoryview) -> None:
        """#VMEXIT has written `view`."""
        held = self._held.get(vmcb)
        if held is not None:
            for where in _STORED:
                held[where] = view[where]

    def held(self, vmcb: int) -> bytes | None:
        """What the processor remembers of a VMCB; None if nothing."""
        found = self._held.get(vmcb)
        return bytes(found) if found is not None else None

    def forget(self, vmcb: int) -> None:
        """VMRUN has refused it."""
        self._held.pop(vmcb, None)


