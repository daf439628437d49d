"""Our emulator: the PC of `ivshmem_lab.pc` on the Unicorn engine, with QEMU's options and QMP."""
