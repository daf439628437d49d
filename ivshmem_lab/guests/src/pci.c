/* Facts: PCI Local Bus Specification 3.0, sections 3.2.2.3.2 (mechanism #1) and 6.2.5.1 (sizing a BAR). */
#include "pci.h"

#define CONFIG_ADDRESS 0xCF8
#define CONFIG_DATA 0xCFC
#define MULTIFUNCTION (0x80u << 16)
#define BAR_IO 1u
#define BAR_64 4u

#define FIRST_WINDOW 0xE0000000ull
#define FIRST_WINDOW_END 0xFEC00000ull /* the I/O APIC is there */
#define SECOND_WINDOW 0x40000000ull    /* for memory that is too large for the first */
#define PAGE_BYTES 4096u /* emulators map whole pages: two BARs never share one */
#define MAX_RANGES 128

static struct {
    u64 start, end;
} taken[MAX_RANGES];
static u32 taken_count;
static u32 claiming;

u32 pci_read(u32 function, u32 offset)
{
    outl(CONFIG_ADDRESS, 0x80000000u | function << 8 | offset);
    return inl(CONFIG_DATA);
}

void pci_write(u32 function, u32 offset, u32 value)
{
    outl(CONFIG_ADDRESS, 0x80000000u | function << 8 | offset);
    outl(CONFIG_DATA, value);
}

void pci_walk_slot(u32 slot, void (*visit)(u32 function))
{
    for (u32 function = slot << 3; function < (slot << 3) + 8; function++) {
        if ((pci_read(function, PCI_ID) & 0xFFFF) == 0xFFFF) {
            if (function == slot << 3)
                return;
            continue;
        }
        visit(function);
        if (function == slot << 3 && !(pci_read(function, PCI_HEADER) & MULTIFUNCTION))
            return;
    }
}

void pci_walk(void (*visit)(u32 function))
{
    for (u32 slot = 0; slot < 32; slot++)
        pci_walk_slot(slot, visit);
}

u32 pci_capability(u32 function, u32 id)
{
    if (!(pci_read(function, PCI_COMMAND) & STATUS_CAPABILITIES))
        return 0;
    u32 offset = pci_read(function, PCI_CAPABILITIES) & 0xFC;
    for (u32 steps = 0; offset && steps < 48; steps++) {
        u32 head = pci_read(function, offset);
        if ((head & 0xFF) == id)
            return offset;
        offset = head >> 8 & 0xFC;
    }
    return 0;
}

static u32 writable_bits(u32 function, u32 offset)
{
    u32 kept = pci_read(function, offset);
    pci_write(function, offset, 0xFFFFFFFF);
    u32 bits = pci_read(function, offset);
    pci_write(function, offset, kept);
    return bits;
}

void pci_size_bars(u32 function, struct bar bars[BARS])
{
    u32 command = pci_read(function, PCI_COMMAND) & 0xFFFF;
    u32 count = (pci_read(function, PCI_HEADER) >> 16 & 0x7F) == 0 ? BARS : 0;

    pci_write(function, PCI_COMMAND, command & ~3u); /* a half-written address must not be decoded */
    for (u32 i = 0; i < BARS; i++)
        bars[i] = (struct bar){0, 0, 0, 0};
    for (u32 i = 0; i < count; i++) {
        struct bar *bar = &bars[i];
        u32 offset = PCI_BAR0 + 4 * i;
        u32 value = pci_read(function, offset);
        u32 bits = writable_bits(function, offset);
        if (!bits)
            continue;
        if (bits & BAR_IO) {
            bar->type = bits & 3;
            continue;
        }
        u32 bits_high = 0xFFFFFFFF;
        bar->type = bits & 15;
        bar->base = value & ~15u;
        if ((bits & BAR_64) && i + 1 < count) {
            bar->base_high = pci_read(function, offset + 4);
            bits_high = writable_bits(function, offset + 4);
            i++;
        }
        bar->size = -((u64)bits_high << 32 | (bits & ~15u));
    }
    pci_write(function, PCI_COMMAND, command);
}

static void take_range(const struct bar *bar)
{
    u64 base = (u64)bar->base_high << 32 | bar->base;
    if (!bar->size || !base || taken_count == MAX_RANGES)
        return;
    taken[taken_count].start = base;
    taken[taken_count++].end = base + (bar->size < PAGE_BYTES ? PAGE_BYTES : bar->size);
}

static void note_ranges(u32 function)
{
    struct bar bars[BARS];
    if (function == claiming || !(pci_read(function, PCI_COMMAND) & COMMAND_MEMORY))
        return;
    pci_size_bars(function, bars);
    for (u32 i = 0; i < BARS; i++)
        take_range(&bars[i]);
}

/* The lowest free address of the window that is a multiple of the size (a power of two, at least a page); 0: none is free. */
static u32 free_address(u64 size, u64 window, u64 window_end)
{
    u64 base = (window + size - 1) & -size;
    for (u32 i = 0; i < taken_count;) {
        if (base + size > window_end)
            return 0;
        if (base < taken[i].end && taken[i].start < base + size) {
            base = (taken[i].end + size - 1) & -size;
            i = 0;
        } else {
            i++;
        }
    }
    return base + size <= window_end ? (u32)base : 0;
}

static int place(u32 function, struct bar *bar, u32 index)
{
    u64 room = bar->size < PAGE_BYTES ? PAGE_BYTES : bar->size;
    bar->base = free_address(room, FIRST_WINDOW, FIRST_WINDOW_END);
    if (!bar->base)
        bar->base = free_address(room, SECOND_WINDOW, FIRST_WINDOW);
    bar->base_high = 0;
    if (!bar->base || taken_count == MAX_RANGES)
        return 0;
    take_range(bar);
    pci_write(function, PCI_BAR0 + 4 * index, bar->base);
    if (bar->type & BAR_64)
        pci_write(function, PCI_BAR0 + 4 * index + 4, 0);
    return 1;
}

int pci_claim(u32 function, struct bar bars[BARS])
{
    u32 decoding = pci_read(function, PCI_COMMAND) & COMMAND_MEMORY;
    int known = 0;

    pci_size_bars(function, bars);
    for (u32 i = 0; i < BARS; i++) {
        struct bar *bar = &bars[i];
        if (!bar->size || (decoding && (bar->base | bar->base_high)))
            continue;
        if (!known) {
            known = 1;
            taken_count = 0;
            claiming = function;
            pci_write(function, PCI_COMMAND, 0);
            pci_walk(note_ranges);
            /* What the firmware did place on this function stays where it is. */
            for (u32 j = 0; decoding && j < BARS; j++)
                take_range(&bars[j]);
        }
        if (!place(function, bar, i))
            return 0;
    }
    pci_write(function, PCI_COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    return 1;
}
