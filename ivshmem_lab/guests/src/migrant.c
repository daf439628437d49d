/* A guest that notices when something of it is lost on the way: it changes every word of a private and of the shared memory
 * in each round, and finds in the next round what it wrote. One x87 register holds pi all the time.
 *
 * Works with ivshmem-plain and ivshmem-doorbell. Says "ready", then goes round without end, or, with idle=1, once per
 * interrupt. An interrupt is told, and answered when the first word of the shared memory names a peer id + 1.
 * Serial input: 'c' prints the state; 'e' ejects what is asked to go (QEMU's docs/specs/acpi_pci_hotplug) and goes on with the
 * private memory alone; 'o' opens the device that is there now, whose memory is filled anew. With watch=1 it does both by
 * itself, and needs no device at the start.
 */
#include "ivshmem.h"

#define PRIVATE_WORDS (256 * 1024)
#define FIRST_SHARED_WORD 1024 /* the page before is for others to write */
#define SERIAL_PORT 0x3F8
#define LSR_DATA_READY 1
#define HOTPLUG_UP 0xAE00
#define HOTPLUG_DOWN 0xAE04
#define HOTPLUG_EJECT 0xAE08

static u32 private_memory[PRIVATE_WORDS];
static struct ivshmem device;
static u32 *shared;
static u32 shared_words; /* 0 while there is no device */
static u32 round_number, plain, interrupts, any;

static u32 expected(u32 index, u32 round, u32 salt) { return (index * 0x9E3779B1u) ^ (round * 0x85EBCA6Bu) ^ salt; }

static void fill(u32 *words, u32 count, u32 salt)
{
    for (u32 i = 0; i < count; i++)
        ((volatile u32 *)words)[i] = expected(i, round_number, salt);
}

static void advance(const char *name, u32 *words, u32 count, u32 salt)
{
    for (u32 i = 0; i < count; i++) {
        volatile u32 *word = words + i;
        u32 found = *word;
        if (found != expected(i, round_number, salt)) {
            print("migrant: %s memory broken: word %u holds %8x, not %8x, in round %u\n", name, i, found,
                  expected(i, round_number, salt), round_number);
            debug_exit(EXIT_FAILED);
        }
        *word = expected(i, round_number + 1, salt);
    }
}

static void check_pi(void)
{
    struct {
        u32 low, high;
        u16 sign_and_exponent;
    } __attribute__((packed)) pi;
    __asm__ volatile("fstpt %0; fldt %0" : "=m"(pi));
    if (pi.low != 0x2168C235 || pi.high != 0xC90FDAA2 || pi.sign_and_exponent != 0x4000) {
        print("migrant: x87 register broken: %4x %8x %8x in round %u\n", pi.sign_and_exponent, pi.high, pi.low, round_number);
        debug_exit(EXIT_FAILED);
    }
}

static void remember_plain(u32 function)
{
    if (!plain && pci_read(function, PCI_ID) == IVSHMEM_ID && !pci_capability(function, CAPABILITY_MSIX))
        plain = function;
}

static void remember_any(u32 function)
{
    if (pci_read(function, PCI_ID) == IVSHMEM_ID)
        any = function;
}

static void place_device(void)
{
    struct bar bars[BARS];
    plain = 0;
    pci_walk(remember_plain);
    if (!plain) {
        ivshmem_open(&device, "migrant");
        return;
    }
    if (!pci_claim(plain, bars) || bars[2].base_high || bars[2].size >> 32) {
        print("migrant: BAR 2 does not lie below 4 GiB\n");
        debug_exit(EXIT_FAILED);
    }
    device.function = plain;
    device.registers = bars[0].base;
    device.memory = bars[2].base;
    device.memory_bytes = (u32)bars[2].size;
}

static void open_device(void)
{
    place_device();
    shared = (u32 *)device.memory + FIRST_SHARED_WORD;
    shared_words = device.memory_bytes / 4 - FIRST_SHARED_WORD;
    write32(device.registers + REG_INTR_MASK, 0x12345678);
    fill(shared, shared_words, 0xCAFE);
}

static void reopen(void)
{
    round_number++; /* what is filled now belongs to the next round */
    open_device();
    round_number--;
    print("migrant: opened\n");
}

static void eject(void)
{
    u32 asked = inl(HOTPLUG_DOWN);
    shared_words = device.vectors = 0;
    outl(HOTPLUG_EJECT, asked);
    print("migrant: ejected %8x\n", asked);
}

static void tell(void)
{
    if (!shared_words) {
        print("migrant: round=%u without a device\n", round_number);
        return;
    }
    print("migrant: round=%u peer_id=%u interrupts=%u mask=%8x memory=%u\n", round_number,
          read32(device.registers + REG_IV_POSITION), interrupts, read32(device.registers + REG_INTR_MASK),
          device.memory_bytes);
}

static void take_interrupts(void)
{
    u32 vectors = device.vectors < MAX_VECTORS ? device.vectors : MAX_VECTORS;
    for (u32 vector = 0; vector < vectors; vector++)
        while (take(vector)) {
            u32 answer_to = *(volatile u32 *)device.memory;
            interrupts++;
            print("migrant: rung %u\n", vector);
            if (answer_to)
                ring(&device, answer_to - 1, vector);
        }
}

void program(void)
{
    u32 idle = 0, watch = 0;
    const struct option options[] = {{"idle", &idle, 0}, {"watch", &watch, 0}};
    parse_command_line(options, sizeof options / sizeof options[0]);
    pci_walk(remember_any);
    if (any || !watch)
        open_device();
    fill(private_memory, PRIVATE_WORDS, 0x5EED);
    __asm__ volatile("fninit; fldpi");
    print("migrant: ready\n");
    for (;; round_number++) {
        if (idle)
            wait_for_interrupt();
        enable_interrupts();
        advance("private", private_memory, PRIVATE_WORDS, 0x5EED);
        advance("shared", shared, shared_words, 0xCAFE);
        disable_interrupts();
        check_pi();
        take_interrupts();
        if (watch) {
            if (inl(HOTPLUG_DOWN))
                eject();
            if (inl(HOTPLUG_UP) && !shared_words)
                reopen();
        }
        u8 wish = inb(SERIAL_PORT + 5) & LSR_DATA_READY ? inb(SERIAL_PORT) : 0;
        if (wish == 'c')
            tell();
        else if (wish == 'e')
            eject();
        else if (wish == 'o')
            reopen();
    }
}
