"""The I/O port space and the memory-mapped device space."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable


class PortDevice(Protocol):
    """What answers at I/O ports.  `size` is 1, 2 or 4 bytes and never above the width the device was added with."""

    def read_port(self, port: int, size: int) -> int: ...

    def write_port(self, port: int, size: int, value: int) -> None: ...


class MmioDevice(Protocol):
    """What answers in a physical address range; `offset` counts from the first address it was added with."""

    def read_mmio(self, offset: int, size: int) -> int: ...

    def write_mmio(self, offset: int, size: int, value: int) -> None: ...


T_co = TypeVar("T_co", covariant=True)
State = Mapping[str, int | str]


@runtime_checkable
class Inspectable(Protocol):
    """A device that shows itself to people.  `name` is a short word for it, `title` what it is."""

    name: str
    title: str

    def state(self) -> State:
        """What it holds now.  Nothing changes: no register is read as software would read it."""


class Claim(NamedTuple):
    """Ports or addresses first..last and what answers there."""

    first: int
    last: int
    device: object


@dataclass(frozen=True, slots=True)
class Route(Generic[T_co]):
    """Ports or addresses first..last are a device's; it takes at most `width` bytes in a piece."""

    first: int
    last: int
    device: T_co
    width: int


class AnyDevice(PortDevice, MmioDevice, Protocol):
    """What answers in either space."""


class Decoder(Protocol):
    """Devices that software moves about: asked for what no fixed device claims."""

    def route(self, address: int, io: bool) -> Route[AnyDevice] | None: ...

    def claims(self, io: bool) -> Sequence[Claim]:
        """Where they are now, ascending."""


class Bus:
    """Routes accesses to devices.  What nobody claims reads as all ones and swallows writes.

    `unclaimed` counts such accesses: keys ("port", number) and ("mmio", page address), and ("other", 0) for all that
    come after `UNCLAIMED_KEYS` different ones, so that a guest cannot make it grow without bound.
    """

    UNCLAIMED_KEYS = 1024

    def __init__(self) -> None:
        self._ports: dict[int, Route[PortDevice]] = {}
        self._mmio: list[Route[MmioDevice]] = []
        self.decoder: Decoder | None = None
        self.unclaimed: Counter[tuple[str, int]] = Counter()

    def add_ports(self, first: int, last: int, device: PortDevice, width: int = 1) -> None:
        """Give ports first..last to `device`.  An access wider than `width` bytes, or leaving the range, is split."""
        if not 0 <= first <= last <= 0xFFFF:
            raise ValueError(f"ports {first:#x}..{last:#x} are not a range within 0..0xffff")
        for port in range(first, last + 1):
            if port in self._ports:
                raise ValueError(f"port {port:#x} already belongs to {type(self._ports[port].device).__name__}")
        claim = Route(first, last, device, width)
        self._ports.update(dict.fromkeys(range(first, last + 1), claim))

    def add_mmio(self, first: int, last: int, device: MmioDevice, width: int = 8) -> None:
        """Give physical addresses first..last to `device`."""
        if not 0 <= first <= last:
            raise ValueError(f"addresses {first:#x}..{last:#x} are not a range")
        for other in self._mmio:
            if first <= other.last and other.first <= last:
                raise ValueError(
                    f"addresses {first:#x}..{last:#x} overlap {other.first:#x}..{other.last:#x} of "
                    f"{type(other.device).__name__}"
                )
        self._mmio.append(Route(first, last, device, width))
        self._mmio.sort(key=attrgetter("first"))

    def remove_mmio(self, first: int) -> None:
        """Take back the range that starts at `first` (a base register moved).  KeyError if there is none."""
        for index, claim in enumerate(self._mmio):
            if claim.first == first:
                del self._mmio[index]
                return
        raise KeyError(f"no MMIO range starts at {first:#x}")

    def claims_mmio(self, address: int) -> bool:
        """Whether a device answers at an address."""
        return self._find_mmio(address) is not None

    def mmio_ranges(self) -> list[tuple[int, int]]:
        """All (first, last) address pairs that belong to devices, ascending."""
        return [(claim.first, claim.last) for claim in self._mmio]

    def mmio_claims(self) -> list[Claim]:
        """All address ranges with their devices, ascending."""
        fixed = [Claim(claim.first, claim.last, claim.device) for claim in self._mmio]
        return sorted([*fixed, *self._moved(False)], key=attrgetter("first"))

    def port_claims(self) -> list[Claim]:
        """All port ranges with their devices, ascending."""
        claims = {claim.first: claim for claim in self._ports.values()}
        fixed = [Claim(claim.first, claim.last, claim.device) for claim in claims.values()]
        return sorted([*fixed, *self._moved(True)], key=attrgetter("first"))

    def _moved(self, io: bool) -> Sequence[Claim]:
        return () if self.decoder is None else self.decoder.claims(io)

    def read_port(self, port: int, size: int) -> int:
        claim = self._ports.get(port)
        if claim is not None and size == 1:  # the common case
            return claim.device.read_port(port, 1) & 0xFF
        value = 0
        for done, step, claim in self._port_pieces(port, size):
            piece = claim.device.read_port(port + done, step) if claim else -1
            value |= (piece & ((1 << 8 * step) - 1)) << 8 * done
        return value

    def write_port(self, port: int, size: int, value: int) -> None:
        claim = self._ports.get(port)
        if claim is not None and size == 1:
            claim.device.write_port(port, 1, value & 0xFF)
            return
        for done, step, claim in self._port_pieces(port, size):
            if claim:
                claim.device.write_port(port + done, step, value >> 8 * done & ((1 << 8 * step) - 1))

    def read_mmio(self, address: int, size: int) -> int:
        value = 0
        for done, step, claim in self._mmio_pieces(address, size):
            piece = claim.device.read_mmio(address + done - claim.first, step) if claim else -1
            value |= (piece & ((1 << 8 * step) - 1)) << 8 * done
        return value

    def write_mmio(self, address: int, size: int, value: int) -> None:
        for done, step, claim in self._mmio_pieces(address, size):
            if claim:
                piece = value >> 8 * done & ((1 << 8 * step) - 1)
                claim.device.write_mmio(address + done - claim.first, step, piece)

    def _find_mmio(self, address: int) -> Route[MmioDevice] | None:
        index = bisect_right(self._mmio, address, key=attrgetter("first")) - 1
        if index >= 0 and address <= self._mmio[index].last:
            return self._mmio[index]
        return None if self.decoder is None else self.decoder.route(address, False)

    def _find_port(self, port: int) -> Route[PortDevice] | None:
        claim = self._ports.get(port)
        return claim if claim is not None or self.decoder is None else self.decoder.route(port, True)

    def _port_pieces(self, port: int, size: int) -> list[tuple[int, int, Route[PortDevice] | None]]:
        claim = self._find_port(port)
        if claim and size <= claim.width and port + size - 1 <= claim.last:
            return [(0, size, claim)]
        pieces: list[tuple[int, int, Route[PortDevice] | None]] = []
        done = 0
        while done < size:
            claim = self._find_port(port + done)
            step = _step(size - done, claim.width, claim.last - port - done + 1) if claim else 1
            pieces.append((done, step, claim))
            done += step
        if any(claim is None for _, _, claim in pieces):
            self._count(("port", port))
        return pieces

    def _mmio_pieces(self, address: int, size: int) -> list[tuple[int, int, Route[MmioDevice] | None]]:
        claim = self._find_mmio(address)
        if claim and size <= claim.width and address + size - 1 <= claim.last:
            return [(0, size, claim)]
        pieces: list[tuple[int, int, Route[MmioDevice] | None]] = []
        done = 0
        while done < size:
            claim = self._find_mmio(address + done)
            step = _step(size - done, claim.width, claim.last - address - done + 1) if claim else 1
            pieces.append((done, step, claim))
            done += step
        if any(claim is None for _, _, claim in pieces):
            self._count(("mmio", address & ~0xFFF))
        return pieces

    def _count(self, key: tuple[str, int]) -> None:
        if key not in self.unclaimed and len(self.unclaimed) >= self.UNCLAIMED_KEYS:
            key = ("other", 0)
        self.unclaimed[key] += 1


def _step(*limits: int) -> int:
    """The largest power of two within all limits: the size of the next access."""
    return 1 << (min(limits).bit_length() - 1)
