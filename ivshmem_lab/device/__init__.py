"""What the guest sees: PCI configuration space, MSI-X, the ivshmem registers. Pure: effects come back as values."""
