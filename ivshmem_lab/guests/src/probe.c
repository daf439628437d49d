/* Prints what is on bus 0 and every register of every ivshmem device.
 *
 * Two emulators that are alike print the same text but for the lines that start with "addr ": the firmware chose those.
 */
#include "ivshmem.h"

#define BAR_64 4u
#define BAR_PREFETCHABLE 8u
#define SHOWN_ENTRIES 8u
#define SHOWN_PBA_WORDS 8u
#define RESERVED_START 0x10
#define RESERVED_END 0x100

/* ACPI PCI hot-plug of QEMU's i440fx machine (docs/specs/acpi_pci_hotplug). */
#define HOTPLUG_UP 0xAE00
#define HOTPLUG_DOWN 0xAE04
#define HOTPLUG_EJECT 0xAE08
#define PAUSES_PER_POLL 20000

static void show_function(u32 function)
{
    u32 id = pci_read(function, PCI_ID), class = pci_read(function, PCI_CLASS);
    print("bus 00:%2x.%u %4x:%4x rev %2x class %6x header %2x\n", function >> 3, function & 7, id & 0xFFFF, id >> 16, class & 0xFF,
          class >> 8, pci_read(function, PCI_HEADER) >> 16 & 0xFF);
}

static void show_dump(const char *title, const u32 words[64])
{
    for (u32 row = 0; row < 16; row++) {
        print("%s %2x:", title, 16 * row);
        for (u32 i = 0; i < 16; i++)
            print(" %2x", words[4 * row + i / 4] >> (8 * (i % 4)) & 0xFF);
        print("\n");
    }
}

static void show_config(u32 function, const struct bar bars[BARS])
{
    u32 words[64];
    for (u32 i = 0; i < 64; i++)
        words[i] = pci_read(function, 4 * i);
    for (u32 i = 0; i < BARS; i++)
        words[PCI_BAR0 / 4 + i] = bars[i].type;
    show_dump("config", words);
}

/* The bits that keep what is written. Nothing may be decoded at the addresses that this puts into the BARs. */
static void show_writable(u32 function)
{
    u32 words[64];
    u32 command = pci_read(function, PCI_COMMAND) & 0xFFFF;
    pci_write(function, PCI_COMMAND, 0);
    for (u32 i = 0; i < 64; i++) {
        if (4 * i == PCI_COMMAND)
            continue;
        u32 kept = pci_read(function, 4 * i);
        pci_write(function, 4 * i, 0xFFFFFFFF);
        u32 ones = pci_read(function, 4 * i);
        pci_write(function, 4 * i, 0);
        words[i] = ones & ~pci_read(function, 4 * i);
        pci_write(function, 4 * i, kept);
    }
    pci_write(function, PCI_COMMAND, 0xFFFF);
    words[PCI_COMMAND / 4] = pci_read(function, PCI_COMMAND) & 0xFFFF;
    pci_write(function, PCI_COMMAND, command);
    show_dump("writable", words);
}

static void show_bars(const struct bar bars[BARS])
{
    for (u32 i = 0; i < BARS; i++) {
        const struct bar *bar = &bars[i];
        if (!bar->size)
            continue;
        print("bar %u size 0x%8x%8x %s%s\n", i, (u32)(bar->size >> 32), (u32)bar->size, bar->type & BAR_64 ? "64-bit" : "32-bit",
              bar->type & BAR_PREFETCHABLE ? " prefetchable" : "");
        print("addr bar %u 0x%8x%8x\n", i, bar->base_high, bar->base);
    }
}

static void show_register(u32 address, const char *name)
{
    u32 narrow = read8(address), half = read16(address);
    print("register %2x %s: read8 %2x read16 %4x read32 %8x\n", address & 0xFF, name, narrow, half, read32(address));
}

static void show_registers(u32 base)
{
    u32 mask = base + REG_INTR_MASK, status = base + REG_INTR_STATUS, position = base + REG_IV_POSITION;

    show_register(mask, "IntrMask");
    show_register(status, "IntrStatus");
    show_register(position, "IVPosition");
    show_register(base + REG_DOORBELL, "Doorbell");
    print("peer_id %u\n", read32(position));

    write32(mask, 0xA5C3F01E);
    print("IntrMask write32 a5c3f01e:");
    print(" %8x %4x %2x", read32(mask), read16(mask), read8(mask));
    print(" bytes 1-3 %2x %2x", read8(mask + 1), read8(mask + 2));
    print(" %2x\n", read8(mask + 3));
    write8(mask + 1, 0x06);
    print("IntrMask write8 06 at 1: %8x\n", read32(mask));
    write16(mask + 2, 0x1234);
    print("IntrMask write16 1234 at 2: %8x\n", read32(mask));
    write32(mask, 0);
    print("IntrMask write32 0: %8x\n", read32(mask));

    write32(status, 0x12345678);
    u32 first = read32(status);
    print("IntrStatus write32 12345678: %8x then %8x\n", first, read32(status));
    write32(status, 0x87654321);
    u32 beside = read8(status + 1), low = read8(status);
    print("IntrStatus write32 87654321: read8 at 1 %2x, at 0 %2x, then %8x\n", beside, low, read32(status));

    u32 before = read32(position);
    write32(position, ~before);
    print("IVPosition after write32: %s\n", read32(position) == before ? "unchanged" : "changed");

    u32 any = 0;
    for (u32 offset = RESERVED_START; offset < RESERVED_END; offset += 4)
        any |= read32(base + offset);
    print("reserved 10-ff: %8x", any);
    any = 0;
    for (u32 offset = RESERVED_START; offset < RESERVED_END; offset += 4) {
        write32(base + offset, 0xFFFFFFFF);
        any |= read32(base + offset);
    }
    first = read32(mask);
    print(" after write32 %8x, IntrMask %8x IntrStatus %8x\n", any, first, read32(status));
}

static void show_entry(u32 entry, u32 number)
{
    u32 kept[4], ones[4], zeros[4];
    for (u32 i = 0; i < 4; i++) {
        kept[i] = read32(entry + 4 * i);
        write32(entry + 4 * i, 0xFFFFFFFF);
        ones[i] = read32(entry + 4 * i);
        write32(entry + 4 * i, 0);
        zeros[i] = read32(entry + 4 * i);
        write32(entry + 4 * i, kept[i]);
    }
    print("entry %u: address %8x %8x data %8x control %8x\n", number, kept[0], kept[1], kept[2], kept[3]);
    print("entry %u: ones %8x %8x %8x %8x zeros %8x %8x %8x %8x\n", number, ones[0], ones[1], ones[2], ones[3], zeros[0], zeros[1],
          zeros[2], zeros[3]);
    if (number)
        return;
    write32(entry + 8, 0xFFFFFFFF);
    print("entry 0: data ffffffff read16 %4x read8 %2x", read16(entry + 8), read8(entry + 8));
    write8(entry + 8, 0);
    write16(entry + 8, 0);
    print(" after write8 and write16 of 0 %8x\n", read32(entry + 8));
    write32(entry + 8, kept[2]);
}

static void show_msix(u32 function, const struct bar bars[BARS])
{
    u32 capability = pci_capability(function, CAPABILITY_MSIX);
    if (!capability) {
        print("msix none\n");
        return;
    }
    u32 control = pci_read(function, capability) >> 16;
    u32 table = pci_read(function, capability + 4), pba = pci_read(function, capability + 8);
    u32 vectors = (control & 0x7FF) + 1;
    print("msix capability %2x control %4x table %8x pba %8x\n", capability, control, table, pba);
    print("msix vectors %u table bar %u offset 0x%8x pba bar %u offset 0x%8x\n", vectors, table & 7, table & ~7u, pba & 7, pba & ~7u);
    if ((table & 7) >= BARS || (pba & 7) >= BARS || !bars[table & 7].size || !bars[pba & 7].size)
        return;
    u32 entry = bars[table & 7].base + (table & ~7u), pending = bars[pba & 7].base + (pba & ~7u);
    for (u32 i = 0; i < vectors && i < SHOWN_ENTRIES; i++)
        show_entry(entry + 16 * i, i);
    for (u32 i = 0; i < (vectors + 63) / 64 * 2 && i < SHOWN_PBA_WORDS; i++) {
        u32 before = read32(pending + 4 * i);
        write32(pending + 4 * i, 0xFFFFFFFF);
        print("pba %u: %8x after write32 %8x\n", i, before, read32(pending + 4 * i));
    }
}

static void show_memory(const struct bar *bar)
{
    if (bar->base_high || (bar->size + bar->base) >> 32) {
        print("memory lies above 4 GiB: not read\n");
        return;
    }
    print("memory size %u first %8x last %8x\n", (u32)bar->size, read32(bar->base), read32(bar->base + (u32)bar->size - 4));
}

static void show_ivshmem(u32 function)
{
    struct bar bars[BARS];
    if (pci_read(function, PCI_ID) != IVSHMEM_ID)
        return;
    print("ivshmem 00:%2x.%u\n", function >> 3, function & 7);
    if (!pci_claim(function, bars)) {
        print("no room for its BARs below 4 GiB\n");
        return;
    }
    show_config(function, bars);
    show_writable(function);
    show_bars(bars);
    show_registers(bars[0].base);
    show_msix(function, bars);
    show_memory(&bars[2]);
}

static void show_newcomer(u32 function)
{
    show_function(function);
    show_ivshmem(function);
}

/* A slot's up bit may stay or may be cleared by the read: only a bit that was not there at the last poll is news. */
static void __attribute__((noreturn)) watch(void)
{
    u32 known = 0;
    print("probe: watching\n");
    for (;;) {
        u32 up = inl(HOTPLUG_UP), down = inl(HOTPLUG_DOWN);
        for (u32 slot = 0; slot < 32; slot++) {
            u32 bit = 1u << slot;
            if (up & ~known & bit) {
                print("came slot %2x\n", slot);
                pci_walk_slot(slot, show_newcomer);
                print("probe: done\n");
            }
            if (down & bit) {
                print("leave slot %2x\n", slot);
                outl(HOTPLUG_EJECT, bit);
                up &= ~bit;
            }
        }
        known = up;
        for (u32 i = 0; i < PAUSES_PER_POLL; i++)
            cpu_pause();
    }
}

void program(void)
{
    u32 leave = 0, watches = 0;
    const struct option options[] = {{"exit", &leave, 0}, {"watch", &watches, 0}};

    parse_command_line(options, sizeof options / sizeof options[0]);
    pci_walk(show_function);
    pci_walk(show_ivshmem);
    print("probe: done\n");
    if (leave)
        debug_exit(EXIT_OK);
    if (watches)
        watch();
}
