"""Makes small qcow2 images (qemu docs/interop/qcow2), so that tests need no qemu-img."""

from __future__ import annotations

from struct import pack

CLUSTER = 65536


def qcow2(size: int, clusters: dict[int, bytes], backing: str = "") -> bytes:
    """An image with these clusters, by number; the others read as zeros."""
    name = backing.encode()
    header = pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 3, 0x200 if name else 0, len(name), 16, size, 0, 1, CLUSTER, 2 * CLUSTER, 1, 0, 0
    ) + pack(">QQQII", 0, 0, 0, 4, 104)
    first = header.ljust(0x200, b"\0") + name
    refcount_table = pack(">Q", 3 * CLUSTER)
    l2_at, data_at = 4 * CLUSTER, 5 * CLUSTER
    l2, data = bytearray(CLUSTER), b""
    for number, content in clusters.items():
        l2[8 * number : 8 * number + 8] = pack(">Q", data_at + len(data) | 1 << 63)
        data += content.ljust(CLUSTER, b"\0")
    used = 5 + len(clusters)
    l1 = pack(">Q", l2_at | 1 << 63)
    parts = (first, l1, refcount_table, pack(f">{used}H", *[1] * used), bytes(l2))
    return b"".join(part.ljust(CLUSTER, b"\0") for part in parts) + data
