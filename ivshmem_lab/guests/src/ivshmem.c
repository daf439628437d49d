/* MSI-X as PCI Local Bus Specification 3.0, section 6.8.2, has it; message address as Intel SDM 3A, section 11.11.1. */
#include "ivshmem.h"

#define LAPIC_ID 0x20
#define MSIX_ENABLE (1u << 31)
#define MSIX_FUNCTION_MASK (1u << 30)

static u32 found;

static void remember_first(u32 function)
{
    if (!found && pci_read(function, PCI_ID) == IVSHMEM_ID && pci_capability(function, CAPABILITY_MSIX))
        found = function;
}

static void enable_msix(struct ivshmem *device, const struct bar bars[BARS])
{
    u32 capability = pci_capability(device->function, CAPABILITY_MSIX);
    u32 control = pci_read(device->function, capability);
    u32 table = pci_read(device->function, capability + 4);
    u32 entry = bars[table & 7].base + (table & ~7u);
    u32 destination = read32(LAPIC_BASE + LAPIC_ID) >> 24;

    device->vectors = (control >> 16 & 0x7FF) + 1;
    for (u32 vector = 0; vector < device->vectors && vector < MAX_VECTORS; vector++, entry += 16) {
        write32(entry, LAPIC_BASE | destination << 12);
        write32(entry + 4, 0);
        write32(entry + 8, FIRST_IRQ_VECTOR + vector);
        write32(entry + 12, 0);
    }
    pci_write(device->function, capability, (control & ~MSIX_FUNCTION_MASK) | MSIX_ENABLE);
}

void ivshmem_open(struct ivshmem *device, const char *program_name)
{
    struct bar bars[BARS];

    pci_walk(remember_first);
    if (!found) {
        print("%s: no ivshmem-doorbell device on bus 0\n", program_name);
        debug_exit(EXIT_FAILED);
    }
    if (!pci_claim(found, bars) || bars[2].base_high || bars[2].size >> 32) {
        print("%s: BAR 2 does not lie below 4 GiB\n", program_name);
        debug_exit(EXIT_FAILED);
    }
    device->function = found;
    device->registers = bars[0].base;
    device->memory = bars[2].base;
    device->memory_bytes = (u32)bars[2].size;
    device->peer_id = read32(device->registers + REG_IV_POSITION);
    enable_msix(device, bars);
}
