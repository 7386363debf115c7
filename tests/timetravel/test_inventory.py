# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing of a machine is forgotten: every class stands in the inventory, and every attribute is kept or named with a reason."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType

import pytest

from introspect.layout import Bits
from tests.timetravel.cases import CASES
from vmdbg.iommu.config import IommuConfig
from vmdbg.machine import Config, Machine
from vmdbg.platform.pci.catalogue import KINDS, DeviceSpec
from vmdbg.timetravel.allowed import ALLOWED, CALLBACKS, shapes
from vmdbg.timetravel.forms import FORMS
from vmdbg.timetravel.inventory import BEYOND, FIXED, NOT_STATE, PARTS, attributes, not_state, parts, states
from vmdbg.timetravel.restoring import _CONTEXT, is_wiring, state
from vmdbg.timetravel.snapshot import take
from vmdbg.timetravel.tree import SnapshotError

ROOMS = ("cpu", "engine", "iommu", "platform", "svm", "machine", "history", "late_launch")

MOMENTARY = frozenset((
    "vmdbg.cpu.attention.Encoding", "vmdbg.cpu.core.Cpu", "vmdbg.cpu.pending.Pending", "vmdbg.cpu.accesses.Accesses",
    "vmdbg.cpu.descriptors.Descriptor", "vmdbg.cpu.floats.Format", "vmdbg.cpu.floats.Number", "vmdbg.cpu.simd.Form",
    "vmdbg.engine.engine.Stop", "vmdbg.engine.fingerprint.Sums", "vmdbg.engine.layout.Probe",
    "vmdbg.engine.physical.Arena", "vmdbg.engine.physical.TableReader",
    "vmdbg.engine.runtime.Binding", "vmdbg.engine.runtime.Branch", "vmdbg.engine.runtime.Point", "vmdbg.engine.runtime.Runtime",
    "vmdbg.engine.translations.Translations", "vmdbg.engine.twin.Twin", "vmdbg.engine.twin._Block", "vmdbg.iommu.translation._Walked", "vmdbg.iommu.caches.Recorder", "vmdbg.iommu.config.Reserved", "vmdbg.iommu.ivrs.Alias",
    "vmdbg.iommu.ivrs.Facts", "vmdbg.iommu.ivrs.UnitTable", "vmdbg.iommu.rings.Pointers", "vmdbg.platform.acpi.Board",
    "vmdbg.platform.bus.Claim", "vmdbg.platform.cpuid.Dynamic", "vmdbg.platform.cpuid.Registers",
    "vmdbg.platform.fwcfg.FwCfgContents", "vmdbg.platform.lapic.Register", "vmdbg.platform.pci.capability.Capability",
    "vmdbg.platform.pci.capability.MessageInterrupts", "vmdbg.platform.pci.catalogue.Kind", "vmdbg.platform.pci.config.Rule",
    "vmdbg.platform.pci.capability.ExtendedCapability", "vmdbg.platform.pci.ats.Piece",
    "vmdbg.platform.pci.dma.Message", "vmdbg.platform.pci.dma.Record", "vmdbg.platform.pci.dma.Span",
    "vmdbg.platform.pci.firmware.Firmware", "vmdbg.platform.pci.firmware.Space", "vmdbg.platform.pci.function.Bar",
    "vmdbg.platform.pci.function.Function", "vmdbg.platform.pci.function.Region", "vmdbg.platform.pci.root.Window",
    "vmdbg.platform.tpm.commands.Reader", "vmdbg.platform.virtio.pcap.Frame", "vmdbg.platform.virtio.queue.Buffer",
    "vmdbg.platform.virtio.queue.Chain", "vmdbg.platform.virtio.transport.VirtioDevice", "vmdbg.svm.held.Fresh",
    "vmdbg.svm.ring.Crossing", "vmdbg.svm.ring.Head", "vmdbg.svm.ring.Record", "vmdbg.svm.ring.Slots", "vmdbg.svm.switch.Entry",
    "vmdbg.svm.switch.State", "vmdbg.svm.tlb.GuestTables", "vmdbg.svm.tlb.Registers",
))  # fmt: skip
"""Classes of which nothing is left in a machine that stands still, the engine's own, and those that others derive from."""


def modules() -> Iterator[ModuleType]:
    for room in ROOMS:
        module = importlib.import_module(f"vmdbg.{room}")
        yield module
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"vmdbg.{room}."):
            if not found.name.rpartition(".")[2].startswith("_"):
                yield importlib.import_module(found.name)


def name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def classes() -> list[type]:
    found = {
        cls for module in modules() for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__
    }
    return sorted(found, key=name)


def everything() -> Machine:
    """A machine with each kind of device."""
    image = CASES["hypervisor, strict"].image
    kinds = [kind for kind in KINDS if kind not in ("virtio-blk", "bridge", "pci-bridge")]
    devices = ["bridge,id=port", "pci-bridge,id=bus", "edu,bus=port,ats=on", "edu,bus=bus", *kinds]
    return Machine(str(image), Config(
        cpus=2, dev="strict", tpm=True, hpet=True, iommu=IommuConfig(2, strict=True), strict_tlb=True, vmcb_cache=True,
        devices=tuple(map(DeviceSpec.parse, devices)),
    ))  # fmt: skip


def test_every_class_stands_in_the_inventory() -> None:
    known = {*PARTS, *FIXED, *BEYOND, *(form.cls for form in FORMS.values())}
    unknown = [
        name(cls) for cls in classes()
        if cls not in known and name(cls) not in MOMENTARY
        and not issubclass(cls, BaseException | Enum | Bits) and not getattr(cls, "_is_protocol", False)
    ]  # fmt: skip
    assert not unknown, "say in vmdbg/timetravel/inventory.py what is to become of them in a snapshot"


def test_what_is_momentary_exists_and_stands_nowhere_else() -> None:
    there = {name(cls): cls for cls in classes()}
    assert there.keys() >= MOMENTARY
    assert not [one for one in MOMENTARY if there[one] in FIXED or there[one] in BEYOND]


def test_each_attribute_and_field_has_a_shape() -> None:
    """What may be there, in a file from elsewhere: and nothing has one that there is not."""
    machines = [everything(), *(case.machine() for case in CASES.values())]
    held: dict[type, set[str]] = {}
    for part in (part for machine in machines for part in parts(machine).values()):
        names = {key for key, value in states(part).items() if not is_wiring(value)}
        held.setdefault(type(part), set()).update(names)
    for form in FORMS.values():
        if form.fields:
            held[form.cls] = set(form.fields)
    without = {name(cls): names for cls, found in held.items() if (names := found - shapes(cls).keys())}
    assert not without, "say in vmdbg/timetravel/allowed.py what they may hold"
    assert not [name(form.cls) for form in FORMS.values() if form.cls not in ALLOWED]
    there = {cls: {key for part in map(parts, machines) for one in part.values() if isinstance(one, cls) for key in attributes(one)}
             for cls in ALLOWED.keys() & PARTS}  # fmt: skip
    gone = {name(cls): names for cls, found in there.items() if found and (names := ALLOWED[cls].keys() - found)}
    assert not gone
    for machine in machines:
        machine.close()


def test_what_is_left_out_is_there() -> None:
    """No reason outlives its attribute."""
    machine = everything()
    names: dict[type, set[str]] = {}
    for part in parts(machine).values():
        for cls in type(part).__mro__:
            names.setdefault(cls, set()).update(attributes(part))
    stale = {name(cls): gone for cls in NOT_STATE if cls in names and (gone := NOT_STATE[cls].keys() - names[cls])}
    assert not stale
    machine.close()


def connections(machine: Machine) -> dict[str, str]:
    """Attributes that hold functions, and are no state: which, and whose."""
    found = parts(machine)
    paths = {id(part): path for path, part in found.items()}
    return {
        f"{path}.{key}": f"{getattr(value, '__qualname__', value.__class__)} of {paths.get(id(getattr(value, '__self__', None)))}"
        for path, part in found.items()
        for key, value in attributes(part).items()
        if callable(value) and key not in states(part) and key not in not_state(type(part)) and type(value) not in FIXED
    }


@pytest.mark.parametrize("case", ["hypervisor, strict", "assignment, strict", "secure loader"])
def test_connections_stay_as_the_constructor_made_them(case: str) -> None:
    one = CASES[case]
    fresh, ran = (one.machine() for _ in range(2))
    ran.run(9_000_000)
    assert connections(ran) == connections(fresh)
    for machine in (fresh, ran):
        machine.close()


def test_no_container_is_shared_by_two_attributes() -> None:
    """A snapshot fills each for itself."""
    machine = everything()
    machine.run(3_000_000)
    owners: dict[int, list[str]] = {}
    for path, part in parts(machine).items():
        for key, value in states(part).items():
            if isinstance(value, list | dict | set | bytearray) and not {type(one) for one in value} <= PARTS:
                owners.setdefault(id(value), []).append(f"{path}.{key}")
    assert not [names for names in owners.values() if len(names) > 1]
    machine.close()


def test_an_attribute_of_a_class_that_nobody_knows_stops_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = everything()
    take(machine)
    monkeypatch.setattr(machine.rtc, "battery", Path("new"), raising=False)
    with pytest.raises(SnapshotError, match=r"does not know how to keep class pathlib\.PosixPath.*report it"):
        take(machine)
    machine.close()


def test_a_new_attribute_of_a_device_is_kept_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = everything()
    monkeypatch.setattr(machine.rtc, "battery", [3, {"volts": 12}], raising=False)
    assert "'battery'" in repr(state(machine))
    machine.close()


def test_the_rest_of_a_context_is_the_engines_and_never_changes() -> None:
    """What of Unicorn's context is not kept, but for intercepts, the nested root and pointers, which are made anew."""
    from vmdbg.engine import layout

    kept = {at for part in _CONTEXT for at in range(part.start, part.stop)}
    made = {
        *range(40), *range(layout.INTERCEPT, layout.NESTED_PG_MODE), *range(layout.ERROR_CODE, layout.EXCEPTION_IS_INT + 4),
        *range(layout.EFLAGS + 8, layout.CC_SRC), *range(layout.CC_SRC + 8, layout.CC_OP),  # operands of the last arithmetic
        *range(layout.V_TPR + 4, 5608), *range(layout.DR + 48, layout.DR + 56),  # DR6 of the I/O breakpoint that is ours
    }  # fmt: skip
    for case in ("hypervisor, strict", "nested", "secure loader"):
        one = CASES[case]
        machine = one.machine()
        before = [bytes(cpu.state.bytes) for cpu in machine.cpus]
        while machine.exit_status is None and machine.clock.now < 20_000_000:
            machine.run(1_000_000)
        for cpu, was in zip(machine.cpus, before, strict=True):
            changed = {at for at, (old, new) in enumerate(zip(was, cpu.state.bytes, strict=True)) if old != new}
            assert changed - kept - made == set(), case
        machine.close()


def test_callbacks_are_methods_that_there_are() -> None:
    for cls, names in CALLBACKS.items():
        assert [one for one in names if not callable(getattr(cls, one, None))] == [], cls
