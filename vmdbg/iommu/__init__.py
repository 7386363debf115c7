"""The emulated AMD IOMMU (AMD 48882): what it holds and does.  What its tables mean is `introspect.iommu`'s."""
