"""32-bit x86: a guest with ivshmem, rung by a host peer. ``python docs/plug/x86_32.py``."""

from pathlib import Path

from unicorn import UC_ARCH_X86, UC_MODE_32, Uc

import ivshmem_lab

ENTRY = 0x10000

with ivshmem_lab.Lab() as lab:
    board = lab.server("board", size="1M", vectors=1)
    me = lab.peer("me", connect=board)
    lab.start()
    words = me.memory.view("<u4")
    words[2] = me.peer_id  # whom the guest rings after each interrupt (layout.inc)

    uc = Uc(UC_ARCH_X86, UC_MODE_32)
    uc.mem_map(0, 1 << 20)
    uc.mem_write(ENTRY, Path(__file__).with_suffix(".bin").read_bytes())  # made from x86_32.S by build.py
    with ivshmem_lab.plug(uc, server=board) as device:
        me.wait_for_peer(device.peer_id, 5)
        uc.emu_start(ENTRY, -1)  # the guest sets its device up, says "ready", and sleeps: HLT ends emu_start
        assert me.wait(0, timeout_s=5), "the guest did not say that it is ready"
        for _ in range(100):
            me.ring(device.peer_id, vector=0)
            pc = device.wait(5)  # sleeps until the interrupt, and enters the guest's handler
            assert pc is not None, "no interrupt in 5 s"
            uc.emu_start(pc, -1)
            assert me.wait(0, timeout_s=5), "the guest did not answer"
        print(device)
        print(f"{words[0]} interrupts taken and answered, the last one with number {words[1]}")
