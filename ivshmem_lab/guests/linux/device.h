/* An ivshmem device as an application of Linux sees it: BARs by sysfs, interrupts by VFIO. */
#ifndef DEVICE_H
#define DEVICE_H

#include "sys.h"

#define MOST_VECTORS 2048u

enum { REG_MASK = 0, REG_STATUS = 4, REG_POSITION = 8, REG_DOORBELL = 12 }; /* QEMU, docs/specs/ivshmem-spec.txt */

struct device {
    char bdf[16];
    u64 memory_bytes; /* of BAR 2 */
    u32 vectors;      /* 0: ivshmem-plain */
    volatile u32 *registers;
    u8 *memory;
};

struct interrupts {
    int container, group, device;
    u32 count;
    int events[MOST_VECTORS]; /* an eventfd for each vector */
};

/* Calls `each` for every ivshmem device, in the order of their addresses. Returns how many there are. */
int each_device(void (*each)(struct device *device));
/* Finds a device: "0000:00:03.0", "00:03.0", or 0 for the only one there is. Ends the program when there is none. */
void find_device(struct device *device, const char *bdf);
void map_registers(struct device *device);
void map_memory_of(struct device *device);
u32 peer_id_of(struct device *device);
void ring(struct device *device, u32 peer, u32 vector);
/* Takes the device through VFIO: binds it to vfio-pci, an eventfd per vector, Bus Master on, registers mapped. */
void take_interrupts(struct device *device, struct interrupts *interrupts);
/* Waits for a vector; returns how often it came since the last time, 0 when the time is over. */
u64 wait_vector(struct interrupts *interrupts, u32 vector, u64 deadline_ns);
/* What binds the device now, or "none". */
void driver_of(const struct device *device, char *out, size_t size);

#endif
