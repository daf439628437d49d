/* Serial port, printing, command line, interrupt table, paging, debug exit. */
#include "runtime.h"

#define SERIAL_PORT 0x3F8
#define SERIAL_LSR (SERIAL_PORT + 5)
#define LSR_HOLDING_EMPTY 0x20
#define LSR_ALL_SENT 0x40
#define DEBUG_EXIT_PORT 0xF4

#define CODE_SELECTOR 0x08
#define INTERRUPT_GATE 0x8E00u

#define LAPIC_SVR 0xF0
#define LAPIC_ENABLE 0x100
#define SPURIOUS_VECTOR 0xFF

#define COMMAND_LINE_FLAG 4u
#define COMMAND_LINE_BYTES 1024

/* PAE entries: present, writable, accessed, dirty; 2 MiB page; no-execute (Intel SDM 3A, section 4.4). */
#define PAGE_PRESENT 1u
#define PAGE_2M_FLAGS 0xE3u
#define PAGE_NO_EXECUTE (1ull << 63)
#define CPUID_PAE (1u << 6)
#define CPUID_NX (1u << 20)
#define MSR_EFER 0xC0000080u
#define EFER_NXE 0x800u

struct gate {
    u32 low, high;
};

struct multiboot_info {
    u32 flags, mem_lower, mem_upper, boot_device;
    const char *command_line;
};

extern const u8 fault_stubs[], irq_stubs[], stray_stub[];
void runtime_main(const struct multiboot_info *info);
void fault(u32 vector, u32 error_code, u32 eip) __attribute__((noreturn));

u32 irq_seen[MAX_VECTORS];

static struct gate idt[256] __attribute__((aligned(16)));
static u64 page_pointers[4] __attribute__((aligned(32)));
static u64 page_directories[4 * 512] __attribute__((aligned(4096)));
static char command_line[COMMAND_LINE_BYTES];

static void put(char character)
{
    while (!(inb(SERIAL_LSR) & LSR_HOLDING_EMPTY))
        cpu_pause();
    outb(SERIAL_PORT, (u8)character);
}

static void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static void put_decimal(u32 value)
{
    char digits[11];
    u32 at = 10;
    digits[at] = 0;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    put_text(digits + at);
}

static void put_hex(u32 value, u32 digits)
{
    while (digits--)
        put("0123456789abcdef"[(value >> (4 * digits)) & 15]);
}

void print(const char *format, ...)
{
    __builtin_va_list arguments;
    __builtin_va_start(arguments, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        u32 digits = 8;
        format++;
        if (*format >= '1' && *format <= '8')
            digits = (u32)(*format++ - '0');
        if (*format == 's')
            put_text(__builtin_va_arg(arguments, const char *));
        else if (*format == 'u')
            put_decimal(__builtin_va_arg(arguments, u32));
        else
            put_hex(__builtin_va_arg(arguments, u32), digits);
    }
    __builtin_va_end(arguments);
}

void halt_for_ever(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

void debug_exit(u32 value)
{
    /* The emulator ends at once: let the last byte leave first. Bounded, a UART may never raise the bit. */
    for (u32 tries = 0; tries < 10000 && !(inb(SERIAL_LSR) & LSR_ALL_SENT); tries++)
        cpu_pause();
    outl(DEBUG_EXIT_PORT, value);
    halt_for_ever();
}

void fault(u32 vector, u32 error_code, u32 eip)
{
    (void)error_code; /* not known on every emulator */
    print("fault %u at 0x%8x\n", vector, eip);
    debug_exit(EXIT_FAULT);
}

int same_text(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/* Decimal or 0x hex, 32 bits; returns 0 for anything else. */
static int parse_number(const char *text, u32 *value)
{
    u32 base = 10;
    u64 result = 0;
    if (text[0] == '0' && (text[1] == 'x' || text[1] == 'X'))
        base = 16, text += 2;
    if (!*text)
        return 0;
    for (; *text; text++) {
        u32 digit;
        if (*text >= '0' && *text <= '9')
            digit = (u32)(*text - '0');
        else if (base == 16 && (*text | 32) >= 'a' && (*text | 32) <= 'f')
            digit = (u32)((*text | 32) - 'a') + 10;
        else
            return 0;
        result = result * base + digit;
        if (result >> 32)
            return 0;
    }
    *value = (u32)result;
    return 1;
}

static int apply_token(char *token, const struct option *options, u32 count)
{
    char *value = token;
    while (*value && *value != '=')
        value++;
    if (!*value)
        return 0;
    *value = 0;
    for (u32 i = 0; i < count; i++) {
        if (!same_text(token, options[i].key))
            continue;
        if (options[i].text)
            *options[i].text = value + 1;
        else if (!parse_number(value + 1, options[i].number)) {
            print("%s=%s is not a number of 32 bits\n", token, value + 1);
            debug_exit(EXIT_FAILED);
        }
        return 1;
    }
    *value = '=';
    return 0;
}

void parse_command_line(const struct option *options, u32 count)
{
    int first = 1;
    for (char *at = command_line; *at; first = 0) {
        while (*at == ' ')
            at++;
        if (!*at)
            break;
        char *token = at;
        while (*at && *at != ' ')
            at++;
        if (*at)
            *at++ = 0;
        /* QEMU puts the kernel's path first. */
        if (!apply_token(token, options, count) && !first)
            print("ignored: %s\n", token);
    }
}

static void set_gate(u32 vector, const u8 *handler)
{
    u32 address = (u32)handler;
    idt[vector].low = (CODE_SELECTOR << 16) | (address & 0xFFFF);
    idt[vector].high = (address & 0xFFFF0000) | INTERRUPT_GATE;
}

static void set_up_interrupts(void)
{
    struct {
        u16 limit;
        u32 base;
    } __attribute__((packed)) idt_register = {sizeof idt - 1, (u32)idt};

    /* The 8259s still have whatever vectors the firmware gave them, the exceptions' among them. */
    outb(0x21, 0xFF);
    outb(0xA1, 0xFF);
    for (u32 vector = 0; vector < 256; vector++)
        set_gate(vector, stray_stub);
    for (u32 vector = 0; vector < 32; vector++)
        set_gate(vector, fault_stubs + 16 * vector);
    for (u32 vector = 0; vector < MAX_VECTORS; vector++)
        set_gate(FIRST_IRQ_VECTOR + vector, irq_stubs + 32 * vector);
    __asm__ volatile("lidt %0" ::"m"(idt_register));
    write32(LAPIC_BASE + LAPIC_SVR, LAPIC_ENABLE | SPURIOUS_VECTOR);
}

ALWAYS_INLINE void cpuid(u32 leaf, u32 *eax, u32 *edx)
{
    u32 ebx, ecx = 0;
    __asm__ volatile("cpuid" : "=a"(*eax), "=b"(ebx), "+c"(ecx), "=d"(*edx) : "0"(leaf));
}

/* Identity map of 4 GiB. Pages that are not executable keep stores inline under Unicorn (7 times faster). */
void set_up_paging(void)
{
    u32 highest, eax, edx;
    u64 no_execute = 0;

    cpuid(1, &eax, &edx);
    if (!(edx & CPUID_PAE))
        return;
    cpuid(0x80000000, &highest, &edx);
    if (highest >= 0x80000001) {
        cpuid(0x80000001, &eax, &edx);
        if (edx & CPUID_NX) {
            u32 low, high;
            __asm__ volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(MSR_EFER));
            __asm__ volatile("wrmsr" ::"c"(MSR_EFER), "a"(low | EFER_NXE), "d"(high));
            no_execute = PAGE_NO_EXECUTE;
        }
    }
    for (u32 page = 0; page < 4 * 512; page++)
        page_directories[page] = (page << 21 | PAGE_2M_FLAGS) | (page ? no_execute : 0);
    for (u32 i = 0; i < 4; i++)
        page_pointers[i] = (u32)&page_directories[512 * i] | PAGE_PRESENT;
    __asm__ volatile(
        "mov %%cr4, %%eax; or $0x30, %%eax; mov %%eax, %%cr4;" /* PSE and PAE */
        "mov %0, %%cr3;"
        "mov %%cr0, %%eax; or $0x80000000, %%eax; mov %%eax, %%cr0; jmp 1f; 1:" ::"r"(page_pointers)
        : "eax", "memory");
}

void runtime_main(const struct multiboot_info *info)
{
    if (info->flags & COMMAND_LINE_FLAG)
        for (u32 i = 0; i < COMMAND_LINE_BYTES - 1 && info->command_line[i]; i++)
            command_line[i] = info->command_line[i];
#ifndef PAGING_LATER
    set_up_paging();
#endif
    set_up_interrupts();
    program();
    halt_for_ever();
}
