"""AMD-Vi: the structures of an AMD IOMMU, and what it makes of a device's addresses and interrupts (AMD 48882).

`structures` tables in memory, `records` rings, `registers` MMIO and PCI, `state` one IOMMU's registers, `checks` of device table
entries, `walk` and `remapping` what becomes of a request, `verdicts` what they answer.
"""
