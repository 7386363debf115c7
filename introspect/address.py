"""The four address kinds. Each is an `int` at run time; mypy refuses to mix them.

A guest's linear address (`Gva`) becomes guest-physical (`Gpa`) by the guest's own page tables and system-physical
(`Spa`) by the nested ones (APM2 15.25). A device's DMA address (`Iova`) becomes system-physical by the IOMMU.
"""

from typing import NewType

__all__ = ["Gpa", "Gva", "Iova", "Spa"]

Gva = NewType("Gva", int)
Gpa = NewType("Gpa", int)
Spa = NewType("Spa", int)
Iova = NewType("Iova", int)
