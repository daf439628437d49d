/* PCI configuration mechanism #1 on bus 0, and addresses for BARs that nobody has placed. */
#ifndef PCI_H
#define PCI_H
#include "runtime.h"

#define PCI_ID 0x00
#define PCI_COMMAND 0x04
#define PCI_CLASS 0x08
#define PCI_HEADER 0x0C
#define PCI_BAR0 0x10
#define PCI_CAPABILITIES 0x34
#define COMMAND_MEMORY 2u
#define COMMAND_MASTER 4u
#define STATUS_CAPABILITIES (0x10u << 16)
#define CAPABILITY_MSIX 0x11
#define BARS 6

/* A function is named by slot << 3 | function, as in the address register. */
u32 pci_read(u32 function, u32 offset);
void pci_write(u32 function, u32 offset, u32 value);
/* Calls back for each function that answers: all slots of bus 0, functions 1 to 7 of multi-function devices. */
void pci_walk(void (*visit)(u32 function));
void pci_walk_slot(u32 slot, void (*visit)(u32 function));
u32 pci_capability(u32 function, u32 id);

/* A memory BAR. `size` is 0 for none, for an I/O BAR and for the upper half of a 64-bit one. */
struct bar {
    u32 type; /* the low bits: 1 I/O, 4 64-bit, 8 prefetchable */
    u32 base, base_high;
    u64 size;
};
void pci_size_bars(u32 function, struct bar bars[BARS]);
/* Places what has no address, then sets the command register to memory + bus master. Returns 0 when no room is left. */
int pci_claim(u32 function, struct bar bars[BARS]);

#endif
