"""Linux's own drivers of virtio on the devices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.real.test_linux import DATA, INITRD, KERNEL, Linux
from vmdbg.platform.virtio.pcap import read_pcap

MODULES = DATA / "modules.cpio"
pytestmark = pytest.mark.skipif(
    not all(file.exists() for file in (KERNEL, INITRD, MODULES)), reason="no Linux image with modules; run tests/real/fetch"
)
SIZE = 16 << 20


def boot(*devices: str, options: str = "", cpus: int = 1) -> Linux:
    linux = Linux(f"console=ttyS0 {options}", devices=devices, initrds=(MODULES,), cpus=cpus)
    linux.say("dmesg -n 1")
    assert linux.say("for m in $(cat /modules/order); do insmod /modules/$m.ko; done") == ""
    return linux


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("virtio")
    (folder / "disk.img").write_bytes(bytes(SIZE))
    return folder


@pytest.fixture(scope="module")
def linux(folder: Path) -> Iterator[Linux]:
    linux = boot(
        f"virtio-blk,slot=03.0,file={folder / 'disk.img'},serial=S123", "virtio-rng,slot=04.0,seed=5",
        f"virtio-console,slot=05.0,chardev=file:{folder / 'console'}", "bridge,slot=06.0,id=port",
        f"virtio-net,bus=port,pcap={folder / 'net.pcap'}", cpus=2,
    )  # fmt: skip
    yield linux
    linux.machine.close()


def test_all_are_driven(linux: Linux) -> None:
    found = linux.say("for d in /sys/bus/virtio/devices/*; do readlink $d/driver; done")
    assert sorted(line.rpartition("/")[2] for line in found.splitlines()) == ["virtio_blk", "virtio_console", "virtio_net", "virtio_rng"]
    complaints = linux.say("dmesg | grep -i -E 'virtio.*(error|fail|warn)'")
    assert complaints == ""


def test_a_file_system(linux: Linux, folder: Path) -> None:
    assert linux.say("cat /sys/block/vda/serial") == "S123"
    assert linux.say("cat /sys/block/vda/size") == f"{SIZE // 512}\n"
    linux.say("mke2fs /dev/vda; mkdir /m; mount -t ext4 /dev/vda /m")
    linux.say("dd if=/dev/urandom of=/m/data bs=1k count=3000; md5sum /m/data > /m/sum")
    linux.say("umount /m; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /m")
    assert linux.say("(cd /m; md5sum -c sum)").replace("/m/", "") == "data: OK\n"
    linux.say("umount /m")
    assert (folder / "disk.img").read_bytes() == bytes(SIZE), "the user's file is as it was"


def test_random_numbers_of_the_seed(linux: Linux) -> None:
    assert linux.say("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
    found = bytes.fromhex(linux.say("head -c 24 /dev/hwrng | hexdump -v -e '/1 \"%02x\"'"))
    assert len(found) == 24
    assert found in Random(5).randbytes(1 << 20)


def test_the_console(linux: Linux, folder: Path) -> None:
    linux.say("echo over virtio > /dev/hvc0")
    assert "over virtio" in (folder / "console").read_text()


def test_the_network(linux: Linux, folder: Path) -> None:
    linux.say("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up")
    found = linux.say("ping -c 3 10.0.2.2")
    assert "3 packets transmitted, 3 packets received" in found
    assert "52:55:0a:00:02:02" in linux.say("arp -a")
    frames = list(read_pcap(str(folder / "net.pcap")))
    assert sum(frame.data[12:14] == b"\x08\x00" and frame.data[23] == 1 for frame in frames) == 6


def test_interrupts_are_messages(linux: Linux) -> None:
    found = linux.say("grep virtio /proc/interrupts")
    assert found.count("PCI-MSI") >= 8
    assert re.search(r" [1-9]\d* .*virtio\d+-req", found)


def test_drivers_unbind_and_bind_again(linux: Linux) -> None:
    """A reset of the device, and a new start."""
    for step in ("unbind", "bind"):
        linux.say(f"echo 0000:00:03.0 > /sys/bus/pci/drivers/virtio-pci/{step}")
    linux.say("mount -t ext4 /dev/vda /m")
    assert linux.say("(cd /m; md5sum -c sum)").replace("/m/", "") == "data: OK\n"
    linux.say("umount /m")


def test_the_end(linux: Linux) -> None:
    """The last test of this machine."""
    assert linux.end("poweroff -f")[0] == 0


@pytest.mark.parametrize("options", ["pci=nomsi", "pci=nomsi nolapic noapic acpi=off"])
def test_interrupt_pins(options: str, folder: Path) -> None:
    """Through the I/O APIC, and through the 8259s."""
    disk = f"virtio-blk,slot=03.0,file={folder / 'disk.img'},write=on"
    linux = boot(disk, "virtio-rng,slot=07.0", options=options)
    linux.say("echo through a pin > /dev/vda; sync")
    linux.say("echo 3 > /proc/sys/vm/drop_caches")
    assert linux.say("head -c 13 /dev/vda; head -c 9 /dev/hwrng | wc -c") == "through a pin9\n"
    assert "virtio" in linux.say("cat /proc/interrupts")
    linux.machine.close()
    assert (folder / "disk.img").read_bytes()[:13] == b"through a pin", "it was to be written"
    (folder / "disk.img").write_bytes(bytes(SIZE))
