/* Multiboot v1 entry, GDT and the interrupt stubs.
 *
 * Multiboot specification 0.6.96, section 3: the loader enters in 32-bit protected mode, paging and
 * interrupts off, EAX = 0x2BADB002, EBX = address of the information structure.
 */
#define CODE_SELECTOR 0x08
#define DATA_SELECTOR 0x10
#define LAPIC_EOI 0xFEE000B0
#define MULTIBOOT_MAGIC 0x1BADB002

    .section .multiboot, "a"
    .balign 4
    .long MULTIBOOT_MAGIC, 0, -MULTIBOOT_MAGIC

    .text
    .globl start
start:
    cli
    cld
    lgdt gdt_register
    ljmp $CODE_SELECTOR, $1f
1:  mov $DATA_SELECTOR, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %ax, %fs
    mov %ax, %gs

    mov $bss_start, %edi
    mov $bss_end, %ecx
    sub %edi, %ecx
    shr $2, %ecx
    xor %eax, %eax
    rep stosl

    /* SSE: no emulation, OS support for FXSR and SSE exceptions (Intel SDM 3A, section 2.5). */
    mov %cr0, %eax
    and $~0x4, %eax
    or $0x2, %eax
    mov %eax, %cr0
    mov %cr4, %eax
    or $0x600, %eax
    mov %eax, %cr4

    /* The psABI wants ESP + 4 to be a multiple of 16 at a function's entry: the compiler keeps SSE values on the stack. */
    mov $stack_top - 12, %esp
    push %ebx
    call runtime_main
2:  cli
    hlt
    jmp 2b

/* One stub per exception, 16 bytes apart: (vector, error code, EIP) for fault(). */
    .balign 16
    .globl fault_stubs
fault_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    push $0
    .endif
    push $vector
    jmp fault_common
    .set vector, vector + 1
    .endr

fault_common:
    cld
    call fault

/* One stub per MSI-X vector, 32 bytes apart: count, tell the LAPIC, return. No register is touched, SSE included. */
    .balign 32
    .globl irq_stubs
irq_stubs:
    .set vector, 0
    .rept 8
    .balign 32
    incl irq_count + 4 * vector
    movl $0, LAPIC_EOI
    iret
    .set vector, vector + 1
    .endr

/* Anything else, the LAPIC's spurious interrupt among it, wants no EOI. */
    .balign 16
    .globl stray_stub
stray_stub:
    iret

    .data
    .balign 8
gdt:
    .quad 0
    .quad 0x00CF9B000000FFFF
    .quad 0x00CF93000000FFFF
gdt_register:
    .word . - gdt - 1
    .long gdt

    .bss
    .balign 64
    .globl irq_count
irq_count:
    .space 64
    .balign 16
stack_bottom:
    .space 16384
stack_top:

    .section .note.GNU-stack, "", @progbits
