/* 64-bit Arm, EL1: ivshmem behind an ECAM window; the IRQ handler counts, and rings back. */
#include "layout.inc"
#define CONFIG   (0x3f000000 + (4 << 15))
#define MESSAGES 0x08020000

        .text
        .global _start
_start: ldr     x0, =CONFIG
        ldr     w20, [x0, #BAR0]
        and     w20, w20, #~15
        ldr     w21, [x0, #BAR1]
        and     w21, w21, #~15
        ldr     w22, [x0, #BAR2]
        and     w22, w22, #~15
        mov     w1, #MEMORY_AND_MASTER
        strh    w1, [x0, #COMMAND]
        ldr     w23, =MESSAGES
        str     w23, [x21, #0]          // MSI-X entry 0: address
        str     wzr, [x21, #4]
        mov     w1, #NUMBER
        str     w1, [x21, #8]           // data
        str     wzr, [x21, #12]         // not masked
        mov     w1, #MSIX_ENABLE
        strh    w1, [x0, #MSIX_CONTROL]
        adr     x1, vectors
        msr     vbar_el1, x1
        mov     x9, #0
        ldr     w10, [x22, #ROUNDS]
        ldr     w1, [x22, #ANSWER]
        lsl     w1, w1, #16
        str     w1, [x20, #DOORBELL]    // ready
        msr     daifclr, #2             // interrupts on
        cbz     w10, sleep

work:   ldr     x11, [x22, #WORK]
        add     x11, x11, #1
        str     x11, [x22, #WORK]
        add     x9, x9, #1
        ldr     w12, [x22, #COUNT]
        cmp     w12, w10
        b       1f                      // the flags live across a block's start, where interrupts come
1:      b.lo    work
        str     x9, [x22, #CHECK]
sleep:  wfi
        b       sleep

irq:    ldr     w1, [x23, #CLAIM]       // which one was it?
        cmp     w1, #NONE
        b.eq    1f
        ldr     w2, [x22, #COUNT]
        add     w2, w2, #1
        str     w2, [x22, #COUNT]
        str     w1, [x22, #LAST]
        ldr     w2, [x22, #ANSWER]
        lsl     w2, w2, #16
        str     w2, [x20, #DOORBELL]
        b       irq
1:      eret

        .balign 2048
vectors:
        .space  0x280                   // IRQ from EL1 with SP_EL1
        b       irq
