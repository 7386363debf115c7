"""Virtio devices over PCI (OASIS Virtual I/O Device 1.2): queues, the transport, and the devices."""
