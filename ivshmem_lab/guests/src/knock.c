/* Takes interrupts that it sends to itself, and times what a write to the doorbell costs; no interrupt while it times.
 *
 * `paging=0` leaves the MMU off; `irqs=N` messages to its own local APIC, each taken and returned from (what a CPU must be able to do before it is of
 * use); then, with `writes=N`, `rounds=N` times: N writes to the doorbell for `peer=P`, N reads of IVPosition, N turns of
 * the empty loop, each in ticks of the time stamp counter.
 * Ref: Intel SDM 3A, section 11.6.1 (ICR: bit 18 is "self").
 */
#include "ivshmem.h"

#define LAPIC_ICR_LOW 0x300
#define ICR_SELF (1u << 18)

static u32 ticks_of_writes(const struct ivshmem *device, u32 peer, u32 count)
{
    u64 began = rdtsc();
    for (u32 i = 0; i < count; i++)
        ring(device, peer, 0);
    return (u32)(rdtsc() - began);
}

static u32 ticks_of_reads(const struct ivshmem *device, u32 count)
{
    u64 began = rdtsc();
    for (u32 i = 0; i < count; i++)
        read32(device->registers + REG_IV_POSITION);
    return (u32)(rdtsc() - began);
}

static u32 ticks_of_turns(u32 count)
{
    u64 began = rdtsc();
    for (u32 i = 0; i < count; i++)
        compiler_barrier();
    return (u32)(rdtsc() - began);
}

void program(void)
{
    u32 irqs = 0, peer = 0, writes = 0, rounds = 1, paging = 1;
    const struct option options[] = {{"paging", &paging, 0}, {"irqs", &irqs, 0}, {"peer", &peer, 0},
                                     {"writes", &writes, 0},  {"rounds", &rounds, 0}};
    struct ivshmem device;

    parse_command_line(options, sizeof options / sizeof options[0]);
    print("knock: begins\n");
    if (paging)
        set_up_paging();
    for (u32 i = 0; i < irqs; i++) {
        write32(LAPIC_BASE + LAPIC_ICR_LOW, ICR_SELF | FIRST_IRQ_VECTOR);
        while (!take(0))
            wait_for_interrupt();
    }
    print("knock: took %u interrupts\n", irqs);
    if (writes) {
        ivshmem_open(&device, "knock");
        ticks_of_writes(&device, peer, 16); /* translated, and mapped */
        for (u32 round = 0; round < rounds; round++) {
            u32 written = ticks_of_writes(&device, peer, writes), read = ticks_of_reads(&device, writes);
            print("knock: ticks write=%u read=%u turn=%u\n", written, read, ticks_of_turns(writes));
        }
    }
    print("knock: done\n");
    debug_exit(EXIT_OK);
}
