/* Takes INTx from a legacy ivshmem device (revision 0, msi=off) through the 8259 pair.
 *
 * Waits until IVPosition is no longer -1, then prints each interrupt; `exit=N` leaves after N of them.
 * Ref: QEMU 2.5 docs/specs/ivshmem_device_spec.txt; Intel 8259A data sheet.
 */
#include "ivshmem.h"

#define PIC1 0x20
#define PIC2 0xA0
#define ICW1_ICW4 0x11
#define CASCADE_LINE 2
#define ICW4_8086 1
#define NON_SPECIFIC_EOI 0x20
#define FIRST_PIC1_VECTOR 0x48
#define NO_ID 0xFFFFFFFFu
#define INTERRUPT_LINE 0x3C

static u32 found;

static void remember_first(u32 function)
{
    if (!found && pci_read(function, PCI_ID) == IVSHMEM_ID)
        found = function;
}

/* Lines 8 to 15 come at FIRST_IRQ_VECTOR, whose stubs count; only `line` is let through. */
static void set_up_pic(u32 line)
{
    outb(PIC1, ICW1_ICW4);
    outb(PIC1 + 1, FIRST_PIC1_VECTOR);
    outb(PIC1 + 1, 1 << CASCADE_LINE);
    outb(PIC1 + 1, ICW4_8086);
    outb(PIC2, ICW1_ICW4);
    outb(PIC2 + 1, FIRST_IRQ_VECTOR);
    outb(PIC2 + 1, CASCADE_LINE);
    outb(PIC2 + 1, ICW4_8086);
    outb(PIC1 + 1, (u8)~(1 << CASCADE_LINE));
    outb(PIC2 + 1, (u8)~(1 << (line - 8)));
}

void program(void)
{
    struct bar bars[BARS];
    u32 leave_after = 0;
    const struct option options[] = {{"exit", &leave_after, 0}};

    parse_command_line(options, sizeof options / sizeof options[0]);
    pci_walk(remember_first);
    if (!found || !pci_claim(found, bars)) {
        print("intx: no ivshmem device that fits below 4 GiB on bus 0\n");
        debug_exit(EXIT_FAILED);
    }
    u32 registers = bars[0].base, interrupt = pci_read(found, INTERRUPT_LINE);
    u32 line = interrupt & 0xFF, pin = interrupt >> 8 & 0xFF;
    print("intx: revision %u pin %u line %u\n", pci_read(found, PCI_CLASS) & 0xFF, pin, line);
    if (pin != 1 || line < 8 || line > 15) {
        print("intx: an interrupt pin on a line from 8 to 15 is needed\n");
        debug_exit(EXIT_FAILED);
    }
    set_up_pic(line);
    print("intx: position %8x\n", read32(registers + REG_IV_POSITION));
    while (read32(registers + REG_IV_POSITION) == NO_ID)
        cpu_pause();
    write32(bars[2].base, 0x1D1D1D1D);
    print("intx: attached as %u, memory %8x\n", read32(registers + REG_IV_POSITION), read32(bars[2].base));
    write32(registers + REG_INTR_MASK, 0xFFFFFFFF);
    for (u32 taken = 1;; taken++) {
        while (!take(line - 8))
            wait_for_interrupt();
        u32 status = read32(registers + REG_INTR_STATUS), then = read32(registers + REG_INTR_STATUS);
        outb(PIC2, NON_SPECIFIC_EOI);
        outb(PIC1, NON_SPECIFIC_EOI);
        print("intx: interrupt %u status %u then %u\n", taken, status, then);
        if (taken == leave_after)
            debug_exit(EXIT_OK);
    }
}
