/* The small world that a guest program lives in: ring 0, flat 32 bits, no firmware service.
 *
 * Rules that come from the emulator on Unicorn: lock-prefixed instructions are not atomic between two guests and fences emit
 * nothing, so shared words have one writer each and the doorbell's MMIO write orders them.
 * A program starts with IF = 0; wait_for_interrupt() is called with IF = 0 and returns so.
 */
#ifndef RUNTIME_H
#define RUNTIME_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define MAX_VECTORS 8
#define FIRST_IRQ_VECTOR 0x40
#define LAPIC_BASE 0xFEE00000u

#define EXIT_OK 0
#define EXIT_FAILED 1
#define EXIT_FAULT 2

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
ALWAYS_INLINE void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
ALWAYS_INLINE u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
ALWAYS_INLINE u32 inl(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

ALWAYS_INLINE u8 read8(u32 address) { return *(volatile u8 *)address; }
ALWAYS_INLINE u16 read16(u32 address) { return *(volatile u16 *)address; }
ALWAYS_INLINE u32 read32(u32 address) { return *(volatile u32 *)address; }
ALWAYS_INLINE void write8(u32 address, u8 value) { *(volatile u8 *)address = value; }
ALWAYS_INLINE void write16(u32 address, u16 value) { *(volatile u16 *)address = value; }
ALWAYS_INLINE void write32(u32 address, u32 value) { *(volatile u32 *)address = value; }

ALWAYS_INLINE u64 rdtsc(void)
{
    u64 value;
    __asm__ volatile("rdtsc" : "=A"(value)::"memory");
    return value;
}
ALWAYS_INLINE void cpu_pause(void) { __asm__ volatile("pause" ::: "memory"); }
ALWAYS_INLINE void compiler_barrier(void) { __asm__ volatile("" ::: "memory"); }

ALWAYS_INLINE void enable_interrupts(void) { __asm__ volatile("sti" ::: "memory"); }
ALWAYS_INLINE void disable_interrupts(void) { __asm__ volatile("cli" ::: "memory"); }

/* Sleep until an interrupt was taken. The caller tests its condition with IF = 0 before; sti's shadow closes the gap. */
ALWAYS_INLINE void wait_for_interrupt(void) { __asm__ volatile("sti; hlt; cli" ::: "memory"); }

/* Interrupts taken per MSI-X vector; the stubs in start.S are the only writers. */
extern volatile u32 irq_count[16];

/* Interrupts that the program has seen: take() gives true once for each interrupt. */
extern u32 irq_seen[MAX_VECTORS];
ALWAYS_INLINE int take(u32 vector)
{
    if (irq_count[vector] == irq_seen[vector])
        return 0;
    irq_seen[vector]++;
    return 1;
}

/* %s string, %u decimal, %x hex of as many digits as the one digit before the x says (%8x), %% is not needed. */
void print(const char *format, ...);
void debug_exit(u32 value) __attribute__((noreturn));
void halt_for_ever(void) __attribute__((noreturn));

/* One known key=value of the command line: `text` points to a string, `number` to a u32 (decimal or 0x hex). */
struct option {
    const char *key;
    u32 *number;
    const char **text;
};
void parse_command_line(const struct option *options, u32 count);
int same_text(const char *a, const char *b);

/* Called before program(); one that is compiled with -DPAGING_LATER calls it itself, or never. */
void set_up_paging(void);

/* What each program supplies. */
void program(void);

#endif
