"""The demonstration: emulated PCs, real QEMU and this process share memory, interrupt each other and are measured.

One server and one shared memory. Two guests on our emulator (alice, bob), this process (me) and, where
``qemu-system-x86_64`` is installed, two guests on real QEMU (carol, dave), all running the same ELF. First they exchange
interrupts, then they move bytes. Everything that is compared is pinned to the same CPU and measured in turns.
"""
