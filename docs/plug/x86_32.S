/* 32-bit x86, protected mode: ivshmem behind ports 0xCF8 and 0xCFC; the interrupt handler counts, and rings back. */
#include "layout.inc"
#define SLOT     0x80002000             /* bus 0, slot 4 */
#define LAPIC    0xfee00000
#define IDT      0x28000
#define STACK    0x40000

        .text
        .code32
        .global _start
_start: lgdt    gdtr
        mov     $16, %eax
        mov     %eax, %ss
        mov     %eax, %ds
        mov     $STACK, %esp
        ljmp    $8, $1f                 # a code segment of our own, to which iret can return
1:      mov     $interrupt, %eax        # a gate: offset in two parts, selector, type
        mov     $IDT + 8 * VECTOR, %edi
        mov     %ax, 0(%edi)
        movw    $8, 2(%edi)
        movw    $0x8e00, 4(%edi)
        shr     $16, %eax
        mov     %ax, 6(%edi)
        lidt    idtr

        mov     $BAR0, %ecx
        call    read
        push    %eax                    # BAR 0
        mov     $BAR1, %ecx
        call    read
        mov     %eax, %edi
        mov     $BAR2, %ecx
        call    read
        mov     %eax, %ebp
        mov     $COMMAND, %ecx
        mov     $MEMORY_AND_MASTER, %ebx
        call    write
        movl    $LAPIC, 0(%edi)         # MSI-X entry 0: address
        movl    $0, 4(%edi)
        movl    $VECTOR, 8(%edi)        # data
        movl    $0, 12(%edi)            # not masked
        mov     $MSIX_CONTROL - 2, %ecx
        mov     $MSIX_ENABLE << 16, %ebx
        call    write
        movl    $0x1ff, LAPIC + 0xf0      # local APIC on

        pop     %ebx                    # BAR 0
        xor     %esi, %esi
        mov     ROUNDS(%ebp), %ecx
        mov     ANSWER(%ebp), %eax
        shl     $16, %eax
        mov     %eax, DOORBELL(%ebx)    # ready
        test    %ecx, %ecx
        jz      sleep
        sti
work:   incl    WORK(%ebp)
        inc     %esi
        cmp     %ecx, COUNT(%ebp)
        jmp     1f                      # the flags live across a block's start, where interrupts come
1:      jb      work
        mov     %esi, CHECK(%ebp)
sleep:  sti
        hlt
        jmp     sleep

interrupt:
        push    %eax
        incl    COUNT(%ebp)
        movl    $VECTOR, LAST(%ebp)
        mov     ANSWER(%ebp), %eax
        shl     $16, %eax
        mov     %eax, DOORBELL(%ebx)
        movl    $0, LAPIC + 0xb0          # end of interrupt
        pop     %eax
        iret

read:   mov     $0xcf8, %edx
        lea     SLOT(%ecx), %eax
        out     %eax, %dx
        mov     $0xcfc, %edx
        in      %dx, %eax
        and     $-16, %eax
        ret
write:  mov     $0xcf8, %edx
        lea     SLOT(%ecx), %eax
        out     %eax, %dx
        mov     $0xcfc, %edx
        mov     %ebx, %eax
        out     %eax, %dx
        ret

        .balign 16
gdt:    .quad   0, 0x00cf9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   23
        .long   gdt
idtr:   .word   0x7ff
        .long   IDT
