/* The ivshmem device (QEMU's docs/specs/ivshmem-spec, revision 1) as these programs use it. */
#ifndef IVSHMEM_H
#define IVSHMEM_H
#include "pci.h"

#define IVSHMEM_ID 0x11101AF4u
#define REG_INTR_MASK 0
#define REG_INTR_STATUS 4
#define REG_IV_POSITION 8
#define REG_DOORBELL 12

struct ivshmem {
    u32 function;
    u32 registers; /* address of BAR 0 */
    u32 memory;    /* address of BAR 2 */
    u32 memory_bytes;
    u32 peer_id;
    u32 vectors; /* of the device */
};

/* Finds the first ivshmem-doorbell, places it, sends MSI-X vector v to IDT entry FIRST_IRQ_VECTOR + v.
 * Says what is wrong on serial and leaves by debug exit when there is none. */
void ivshmem_open(struct ivshmem *device, const char *program_name);

ALWAYS_INLINE void ring(const struct ivshmem *device, u32 peer_id, u32 vector)
{
    compiler_barrier();
    write32(device->registers + REG_DOORBELL, peer_id << 16 | vector);
}

#endif
