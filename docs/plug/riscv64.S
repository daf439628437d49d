/* 64-bit RISC-V, machine mode: ivshmem behind an ECAM window; the trap handler counts, and rings back. */
#include "layout.inc"
#define CONFIG   (0x30000000 + (4 << 15))
#define MESSAGES 0x24000000
#define MEIE     0x800
#define MIE      8

        .text
        .global _start
_start: li      t0, CONFIG
        lwu     s4, BAR0(t0)
        andi    s4, s4, ~15
        lwu     s5, BAR1(t0)
        andi    s5, s5, ~15
        lwu     s6, BAR2(t0)
        andi    s6, s6, ~15
        li      t1, MEMORY_AND_MASTER
        sh      t1, COMMAND(t0)
        li      s7, MESSAGES
        sw      s7, 0(s5)               # MSI-X entry 0: address
        sw      zero, 4(s5)
        li      t1, NUMBER
        sw      t1, 8(s5)               # data
        sw      zero, 12(s5)            # not masked
        li      t1, MSIX_ENABLE
        sh      t1, MSIX_CONTROL(t0)
        lla     t1, trap
        csrw    mtvec, t1
        li      t1, MEIE
        csrw    mie, t1
        li      s9, 0
        lw      s10, ROUNDS(s6)
        lw      t1, ANSWER(s6)
        slli    t1, t1, 16
        sw      t1, DOORBELL(s4)        # ready
        csrsi   mstatus, MIE            # interrupts on
        beqz    s10, sleep

work:   ld      t3, WORK(s6)
        addi    t3, t3, 1
        sd      t3, WORK(s6)
        addi    s9, s9, 1
        lw      t4, COUNT(s6)
        bltu    t4, s10, work
        sd      s9, CHECK(s6)
sleep:  wfi
        j       sleep

        .balign 4
trap:   lw      t0, CLAIM(s7)           # which one was it?
        li      t1, NONE
        beq     t0, t1, 1f
        lw      t1, COUNT(s6)
        addi    t1, t1, 1
        sw      t1, COUNT(s6)
        sw      t0, LAST(s6)
        lw      t1, ANSWER(s6)
        slli    t1, t1, 16
        sw      t1, DOORBELL(s4)
        j       trap
1:      mret
