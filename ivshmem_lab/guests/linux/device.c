/* Finding the device in sysfs, mapping its BARs, and taking its interrupts through VFIO. */
#include "device.h"

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>

#define DEVICES "/sys/bus/pci/devices"

struct entry { /* struct linux_dirent64 */
    u64 inode, offset;
    u16 size;
    u8 type;
    char name[];
};

static void path_of(char *out, size_t size, const struct device *device, const char *file)
{
    format(out, size, DEVICES "/%s/%s", device->bdf, file);
}

static long read_attribute(const struct device *device, const char *file, char *out, size_t size)
{
    char path[128];
    path_of(path, sizeof path, device, file);
    return read_file(path, out, size);
}

static u64 bar_bytes(const struct device *device, u32 bar)
{
    char text[2048]; /* a line of "0xSTART 0xEND 0xFLAGS" for each */
    read_attribute(device, "resource", text, sizeof text);
    const char *at = text;
    while (bar-- && *at) {
        while (*at && *at++ != '\n')
            ;
    }
    u64 bounds[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        char word[32];
        size_t length = 0;
        while (*at && *at != ' ' && length < sizeof word - 1)
            word[length++] = *at++;
        word[length] = 0;
        at += *at == ' ';
        read_number(word, &bounds[i]);
    }
    return bounds[1] ? bounds[1] - bounds[0] + 1 : 0;
}

static u32 read_vectors(const struct device *device)
{
    char path[128];
    u8 config[256];
    path_of(path, sizeof path, device, "config");
    long fd = open_file(path, O_RDONLY);
    long count = fd < 0 ? fd : sys(__NR_pread64, fd, config, sizeof config, 0);
    if (fd >= 0)
        sys(__NR_close, fd);
    if (count < (long)sizeof config) /* capabilities are for root */
        return 0;
    u32 at = config[PCI_STATUS] & PCI_STATUS_CAP_LIST ? config[PCI_CAPABILITY_LIST] : 0;
    for (int steps = 0; at >= 64 && at < 253 && steps < 48; steps++, at = config[at + 1])
        if (config[at] == PCI_CAP_ID_MSIX)
            return ((config[at + 2] | (u32)config[at + 3] << 8) & PCI_MSIX_FLAGS_QSIZE) + 1;
    return 0;
}

static int look_at(struct device *device)
{
    char vendor[16], model[16];
    if (read_attribute(device, "vendor", vendor, sizeof vendor) < 0)
        return 0;
    read_attribute(device, "device", model, sizeof model);
    if (!same(vendor, "0x1af4") || !same(model, "0x1110"))
        return 0;
    device->memory_bytes = bar_bytes(device, 2);
    device->vectors = read_vectors(device);
    device->registers = 0;
    device->memory = 0;
    return 1;
}

static int before(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a < *b;
}

int each_device(void (*each)(struct device *device))
{
    static char names[256][16];
    static char entries[65536];
    int count = 0;
    long fd = open_file(DEVICES, O_RDONLY | O_DIRECTORY);
    if (fd < 0)
        fail(fd, DEVICES);
    long bytes;
    while ((bytes = sys(__NR_getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; at < bytes; at += ((struct entry *)(entries + at))->size) {
            const char *name = ((struct entry *)(entries + at))->name;
            if (name[0] == '.' || count == 256)
                continue;
            int place = count++;
            for (; place && before(name, names[place - 1]); place--)
                memcpy(names[place], names[place - 1], sizeof names[0]);
            format(names[place], sizeof names[place], "%s", name);
        }
    sys(__NR_close, fd);
    int found = 0;
    for (int i = 0; i < count; i++) {
        struct device device;
        format(device.bdf, sizeof device.bdf, "%s", names[i]);
        if (look_at(&device)) {
            found++;
            each(&device);
        }
    }
    return found;
}

static struct device only;

static void note_only(struct device *device) { only = *device; }

void find_device(struct device *device, const char *bdf)
{
    if (bdf) {
        format(device->bdf, sizeof device->bdf, "%s%s", length_of(bdf) < 10 ? "0000:" : "", bdf);
        if (!look_at(device))
            fail(0, "%s is no ivshmem device (1af4:1110); `" PROGRAM " info` lists those there are", bdf);
        return;
    }
    int count = each_device(note_only);
    if (count == 0)
        fail(0, "there is no ivshmem device (1af4:1110) on this machine; start QEMU with -device ivshmem-doorbell or plug one in");
    if (count > 1)
        fail(0, "there are %d ivshmem devices; choose one with --device, `" PROGRAM " info` lists them", count);
    *device = only;
}

static void *map_bar(struct device *device, const char *file, u64 size)
{
    char path[128];
    path_of(path, sizeof path, device, file);
    long fd = open_file(path, O_RDWR);
    if (fd < 0)
        fail(fd, "%s", path);
    long address = sys(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    sys(__NR_close, fd);
    if (address < 0 && address > -4096)
        fail(address, "mmap of %s", path);
    return (void *)address;
}

/* Nobody may have enabled the device: without memory decoding, every read gives ones. */
static void enable_memory(struct device *device)
{
    char path[128];
    u16 command = 0;
    path_of(path, sizeof path, device, "config");
    long fd = open_file(path, O_RDWR);
    if (fd < 0)
        fail(fd, "%s", path);
    sys(__NR_pread64, fd, &command, sizeof command, PCI_COMMAND);
    if (!(command & PCI_COMMAND_MEMORY)) {
        command |= PCI_COMMAND_MEMORY;
        sys(__NR_pwrite64, fd, &command, sizeof command, PCI_COMMAND);
    }
    sys(__NR_close, fd);
}

void map_registers(struct device *device)
{
    if (!device->registers) {
        enable_memory(device);
        device->registers = map_bar(device, "resource0", 256);
    }
}

void map_memory_of(struct device *device)
{
    enable_memory(device);
    char path[128];
    path_of(path, sizeof path, device, "resource2_wc"); /* writes combine where caches exist; not there on every kernel */
    long fd = open_file(path, O_RDWR);
    if (fd >= 0)
        sys(__NR_close, fd);
    device->memory = map_bar(device, fd >= 0 ? "resource2_wc" : "resource2", device->memory_bytes);
}

u32 peer_id_of(struct device *device)
{
    map_registers(device);
    return device->registers[REG_POSITION / 4];
}

void ring(struct device *device, u32 peer, u32 vector)
{
    __asm__ volatile("" ::: "memory");
    device->registers[REG_DOORBELL / 4] = peer << 16 | vector;
}

void driver_of(const struct device *device, char *out, size_t size)
{
    char path[128], target[256];
    path_of(path, sizeof path, device, "driver");
    long count = sys(__NR_readlinkat, AT_FDCWD, path, target, sizeof target - 1);
    if (count <= 0) {
        format(out, size, "none");
        return;
    }
    target[count] = 0;
    long at = count;
    while (at && target[at - 1] != '/')
        at--;
    format(out, size, "%s", target + at);
}

static void bind(struct device *device)
{
    char path[128], driver[64];
    driver_of(device, driver, sizeof driver);
    if (same(driver, "vfio-pci"))
        return;
    path_of(path, sizeof path, device, "driver_override");
    long error = write_file(path, "vfio-pci");
    if (error)
        fail(error, "%s", path);
    path_of(path, sizeof path, device, "driver/unbind");
    if (!same(driver, "none") && (error = write_file(path, device->bdf)))
        fail(error, "%s holds %s and does not let go", driver, device->bdf);
    error = write_file("/sys/bus/pci/drivers_probe", device->bdf);
    driver_of(device, driver, sizeof driver);
    if (!same(driver, "vfio-pci"))
        fail(error, "%s was not bound to vfio-pci; is the module there? try: modprobe vfio-pci", device->bdf);
}

static int open_group(struct device *device)
{
    char path[128], target[256];
    path_of(path, sizeof path, device, "iommu_group");
    long count = sys(__NR_readlinkat, AT_FDCWD, path, target, sizeof target - 1);
    if (count <= 0)
        fail(0,
             "%s is in no IOMMU group, so VFIO cannot give its interrupts; start QEMU with -machine q35 "
             "-device intel-iommu,intremap=on and the kernel with intel_iommu=on",
             device->bdf);
    target[count] = 0;
    while (count && target[count - 1] != '/')
        count--;
    format(path, sizeof path, "/dev/vfio/%s", target + count);
    long group = open_file(path, O_RDWR);
    if (group == -16)
        fail(0, "%s is held by another program; interrupts go to one at a time", path);
    if (group < 0)
        fail(group, "%s", path);
    struct vfio_group_status status = {.argsz = sizeof status};
    long error = sys(__NR_ioctl, group, VFIO_GROUP_GET_STATUS, &status);
    if (error || !(status.flags & VFIO_GROUP_FLAGS_VIABLE))
        fail(error, "%s is not viable: bind every device of its group to vfio-pci", path);
    return (int)group;
}

void take_interrupts(struct device *device, struct interrupts *interrupts)
{
    if (!device->vectors)
        fail(0, "%s is an ivshmem-plain: it has no interrupts", device->bdf);
    bind(device);
    long container = open_file("/dev/vfio/vfio", O_RDWR);
    if (container < 0)
        fail(container, "/dev/vfio/vfio; try: modprobe vfio-pci");
    int group = open_group(device);
    int container_fd = (int)container;
    long error = sys(__NR_ioctl, group, VFIO_GROUP_SET_CONTAINER, &container_fd);
    if (error)
        fail(error, "VFIO_GROUP_SET_CONTAINER");
    error = sys(__NR_ioctl, container, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU);
    if (error)
        fail(error, "VFIO_SET_IOMMU; try: modprobe vfio_iommu_type1");
    long fd = sys(__NR_ioctl, group, VFIO_GROUP_GET_DEVICE_FD, device->bdf);
    if (fd < 0)
        fail(fd, "VFIO_GROUP_GET_DEVICE_FD of %s", device->bdf);

    static struct {
        struct vfio_irq_set set;
        i32 events[MOST_VECTORS];
    } request;
    interrupts->container = container_fd;
    interrupts->group = group;
    interrupts->device = (int)fd;
    interrupts->count = device->vectors;
    for (u32 i = 0; i < device->vectors; i++) {
        long event = sys(__NR_eventfd2, 0, O_CLOEXEC);
        if (event < 0)
            fail(event, "eventfd of vector %u", i);
        interrupts->events[i] = request.events[i] = (int)event;
    }
    request.set = (struct vfio_irq_set){.argsz = (u32)(sizeof request.set + 4 * device->vectors),
                                        .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
                                        .index = VFIO_PCI_MSIX_IRQ_INDEX,
                                        .count = device->vectors};
    error = sys(__NR_ioctl, fd, VFIO_DEVICE_SET_IRQS, &request);
    if (error)
        fail(error, "VFIO_DEVICE_SET_IRQS of %u vectors", device->vectors);

    /* Without Bus Master the device's messages are dropped, and nothing says so. */
    struct vfio_region_info config = {.argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX};
    error = sys(__NR_ioctl, fd, VFIO_DEVICE_GET_REGION_INFO, &config);
    u16 command = 0;
    if (error || sys(__NR_pread64, fd, &command, 2, config.offset + PCI_COMMAND) != 2)
        fail(error, "reading the configuration space through VFIO");
    command |= PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER;
    if (sys(__NR_pwrite64, fd, &command, 2, config.offset + PCI_COMMAND) != 2)
        fail(0, "setting Bus Master through VFIO");

    struct vfio_region_info registers = {.argsz = sizeof registers, .index = VFIO_PCI_BAR0_REGION_INDEX};
    error = sys(__NR_ioctl, fd, VFIO_DEVICE_GET_REGION_INFO, &registers);
    long address =
        error ? error : sys(__NR_mmap, 0, registers.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, registers.offset);
    if (address < 0 && address > -4096)
        map_registers(device); /* a BAR below a page in size may not be mapped by VFIO */
    else
        device->registers = (volatile u32 *)address;
}

u64 wait_vector(struct interrupts *interrupts, u32 vector, u64 deadline_ns)
{
    u64 count = 0;
    if (deadline_ns && !wait_readable(interrupts->events[vector], deadline_ns))
        return 0;
    long bytes = sys(__NR_read, interrupts->events[vector], &count, sizeof count);
    if (bytes != sizeof count)
        fail(bytes, "reading the eventfd of vector %u", vector);
    return count;
}
