/* 64-bit x86, long mode: ivshmem behind ports 0xCF8 and 0xCFC; the interrupt handler counts, and rings back. */
#include "layout.inc"
#define SLOT     0x80002000             /* bus 0, slot 4 */
#define LAPIC    0xfee00000
#define IDT      0x28000
#define STACK    0x40000

        .text
        .code64
        .global _start
_start: lgdt    gdtr(%rip)
        mov     $16, %eax
        mov     %eax, %ss
        mov     $STACK, %esp
        pushq   $8                      # a code segment of our own, to which iretq can return
        lea     1f(%rip), %rax
        pushq   %rax
        lretq
1:      lea     interrupt(%rip), %rax   # a gate: offset in three parts, selector, type
        mov     $IDT + 16 * VECTOR, %edi
        mov     %ax, 0(%rdi)
        movw    $8, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shr     $16, %rax
        mov     %ax, 6(%rdi)
        movq    $0, 8(%rdi)
        lidt    idtr(%rip)

        mov     $BAR0, %ecx
        call    read
        mov     %eax, %r12d
        mov     $BAR1, %ecx
        call    read
        mov     %eax, %r13d
        mov     $BAR2, %ecx
        call    read
        mov     %eax, %r14d
        mov     $COMMAND, %ecx
        mov     $MEMORY_AND_MASTER, %ebx
        call    write
        movl    $LAPIC, 0(%r13)         # MSI-X entry 0: address
        movl    $0, 4(%r13)
        movl    $VECTOR, 8(%r13)        # data
        movl    $0, 12(%r13)            # not masked
        mov     $MSIX_CONTROL - 2, %ecx
        mov     $MSIX_ENABLE << 16, %ebx
        call    write
        mov     $LAPIC, %r15d
        movl    $0x1ff, 0xf0(%r15)      # local APIC on

        xor     %r9d, %r9d
        mov     ROUNDS(%r14), %r10d
        mov     ANSWER(%r14), %eax
        shl     $16, %eax
        mov     %eax, DOORBELL(%r12)    # ready
        test    %r10d, %r10d
        jz      sleep
        sti
work:   incq    WORK(%r14)
        inc     %r9
        cmp     %r10d, COUNT(%r14)
        jmp     1f                      # the flags live across a block's start, where interrupts come
1:      jb      work
        mov     %r9, CHECK(%r14)
sleep:  sti
        hlt
        jmp     sleep

interrupt:
        push    %rax
        incl    COUNT(%r14)
        movl    $VECTOR, LAST(%r14)
        mov     ANSWER(%r14), %eax
        shl     $16, %eax
        mov     %eax, DOORBELL(%r12)
        movl    $0, 0xb0(%r15)          # end of interrupt
        pop     %rax
        iretq

read:   mov     $0xcf8, %edx
        lea     SLOT(%rcx), %eax
        out     %eax, %dx
        mov     $0xcfc, %edx
        in      %dx, %eax
        and     $-16, %eax
        ret
write:  mov     $0xcf8, %edx
        lea     SLOT(%rcx), %eax
        out     %eax, %dx
        mov     $0xcfc, %edx
        mov     %ebx, %eax
        out     %eax, %dx
        ret

        .balign 16
gdt:    .quad   0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   23
        .quad   gdt
idtr:   .word   0x7ff
        .quad   IDT
