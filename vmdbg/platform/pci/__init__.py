"""PCI: configuration space, the root complex, DMA and interrupts of devices, and the devices themselves."""
