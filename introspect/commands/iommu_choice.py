"""Which IOMMU a command is about: the machine's, or one whose device table is at an address, as in a dump."""

from __future__ import annotations

from collections.abc import Sequence

from introspect.commands.context import CommandError, Context
from introspect.commands.devices import given_iommu, iommu_of, iommus_of
from introspect.commands.parameters import Choice, Number, Parameter, Physical, Requester
from introspect.commands.registry import Arguments
from introspect.iommu.state import Iommu
from introspect.pci import RequesterId
from introspect.scope import locate_space

__all__ = ["BASE", "BDF", "CHOICE", "NO_IOMMU", "choose", "choose_one"]

BDF = Parameter("BDF", Requester(), help="a device: bus:device.function, as 00:03.0, there or not")
BASE = Parameter("SPA", Physical(), option="--base", only_option=True,
                 help="where a device table is: of an IOMMU whose registers are not known, as in a dump")  # fmt: skip
_ENTRIES = Parameter("N", Number(1, 1 << 16), option="--entries", only_option=True, default=1 << 16,
                     help="with --base: how many devices the table has (65536)")  # fmt: skip
_IRTE = Parameter("BITS", Choice(("32", "128")), option="--irte", only_option=True, default="128",
                  help="with --base: the size of interrupt table entries (128)")  # fmt: skip
CHOICE = (BASE, _ENTRIES, _IRTE)
NO_IOMMU = "no IOMMU is known: devices reach memory by system-physical addresses; `--base SPA` looks at a device table in memory"


def choose(context: Context, arguments: Arguments) -> Sequence[Iommu]:
    """The one that --base describes, or all of the machine's."""
    word = arguments.get(BASE)
    if word is None:
        return iommus_of(context)
    where = word.locate(context, context.host)
    spa = locate_space(context.memory, where.owner, where.space, where.offset)
    if spa is None:
        raise CommandError(str(where), "it is not mapped", "name a system-physical address")
    return (given_iommu(spa, arguments[_ENTRIES], arguments[_IRTE] == "128"),)


def choose_one(context: Context, arguments: Arguments, device: RequesterId) -> Iommu:
    """The one that translates for a device; one that is off where there is none."""
    chosen = choose(context, arguments)
    if arguments.get(BASE) is not None:
        return chosen[0]
    return iommu_of(context, device) or Iommu({})
