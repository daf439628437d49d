"""Virtual machine processes: one class for real QEMU and for our emulator, driven over QMP."""
