/* The system calls and the few functions of a C library that the tool needs. */
#include "sys.h"

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/mman.h>
#include <linux/poll.h>
#include <linux/time.h>

int main(int argc, char **argv);

__asm__(".globl _start\n"
        "_start:\n"
        "  xor %ebp, %ebp\n"
        "  mov %rsp, %rdi\n"
        "  and $-16, %rsp\n"
        "  call begin\n"
        "  hlt\n");

__attribute__((used)) static void begin(long *stack) { leave(main((int)stack[0], (char **)(stack + 1))); }

long sys6(long number, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

void *memcpy(void *to, const void *from, size_t size)
{
    /* Four registers a time, loads first: what TCG translates best (1.3 times SSE, 3 times `rep movsb`). */
    u8 *out = to;
    const u8 *in = from;
    for (; size >= 32; size -= 32, out += 32, in += 32)
        __asm__ volatile("movq (%0), %%rax\n"
                         "movq 8(%0), %%rdx\n"
                         "movq 16(%0), %%r8\n"
                         "movq 24(%0), %%r9\n"
                         "movq %%rax, (%1)\n"
                         "movq %%rdx, 8(%1)\n"
                         "movq %%r8, 16(%1)\n"
                         "movq %%r9, 24(%1)\n" ::"r"(in),
                         "r"(out)
                         : "rax", "rdx", "r8", "r9", "memory");
    while (size--)
        *out++ = *in++;
    return to;
}

void *memset(void *to, int value, size_t size)
{
    u8 *out = to;
    while (size--)
        *out++ = (u8)value;
    return to;
}

size_t length_of(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

int starts_with(const char *text, const char *beginning)
{
    while (*beginning)
        if (*text++ != *beginning++)
            return 0;
    return 1;
}

static int digit_of(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 32;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : 99;
}

int read_number(const char *text, u64 *value)
{
    u64 base = 10, result = 0;
    if (text[0] == '0' && (text[1] | 32) == 'x')
        base = 16, text += 2;
    if ((u64)digit_of(*text) >= base)
        return 0;
    for (; (u64)digit_of(*text) < base; text++) {
        if (result > (~0ull - 15) / base)
            return 0;
        result = result * base + (u64)digit_of(*text);
    }
    u32 shift = 0;
    if ((*text | 32) == 'k')
        shift = 10;
    else if ((*text | 32) == 'm')
        shift = 20;
    else if ((*text | 32) == 'g')
        shift = 30;
    if (shift)
        text++;
    if (*text || (shift && result >> (64 - shift)))
        return 0;
    *value = result << shift;
    return 1;
}

struct writer {
    char *out;
    size_t room, used;
};

static void put(struct writer *w, char c)
{
    if (w->used + 1 < w->room)
        w->out[w->used++] = c;
}

static void put_digits(struct writer *w, u64 value, u32 base)
{
    char digits[24];
    int count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        put(w, digits[--count]);
}

static void put_json(struct writer *w, const char *text)
{
    put(w, '"');
    for (; *text; text++) {
        u8 c = (u8)*text;
        if (c == '"' || c == '\\')
            put(w, '\\');
        if (c >= 32) {
            put(w, (char)c);
            continue;
        }
        for (const char *p = "\\u00"; *p; p++)
            put(w, *p);
        put(w, "0123456789abcdef"[c >> 4]);
        put(w, "0123456789abcdef"[c & 15]);
    }
    put(w, '"');
}

void vformat(char *out, size_t size, const char *form, va_list values)
{
    struct writer w = {out, size, 0};
    for (; *form; form++) {
        if (*form != '%' || !form[1]) {
            put(&w, *form);
            continue;
        }
        i64 number;
        switch (*++form) {
        case 's':
            for (const char *text = va_arg(values, const char *); *text; text++)
                put(&w, *text);
            break;
        case 'j':
            put_json(&w, va_arg(values, const char *));
            break;
        case 'd':
        case 'D':
            number = *form == 'd' ? va_arg(values, i32) : va_arg(values, i64);
            if (number < 0)
                put(&w, '-');
            put_digits(&w, number < 0 ? -(u64)number : (u64)number, 10);
            break;
        case 'u':
            put_digits(&w, va_arg(values, u32), 10);
            break;
        case 'U':
            put_digits(&w, va_arg(values, u64), 10);
            break;
        case 'x':
            put_digits(&w, va_arg(values, u32), 16);
            break;
        case 'X':
            put_digits(&w, va_arg(values, u64), 16);
            break;
        default:
            put(&w, *form);
        }
    }
    if (size)
        out[w.used] = 0;
}

void format(char *out, size_t size, const char *form, ...)
{
    va_list values;
    va_start(values, form);
    vformat(out, size, form, values);
    va_end(values);
}

static char pending[16384];
static size_t pending_bytes;

void flush_output(void)
{
    long error = write_all(1, pending, pending_bytes);
    pending_bytes = 0;
    if (error) {
        say_error("nobody reads the results");
        sys(__NR_exit_group, 1);
    }
}

void put_output(const void *bytes, size_t size)
{
    const u8 *from = bytes;
    while (size) {
        if (pending_bytes == sizeof pending)
            flush_output();
        size_t part = sizeof pending - pending_bytes;
        part = part < size ? part : size;
        memcpy(pending + pending_bytes, from, part);
        pending_bytes += part, from += part, size -= part;
    }
}

void say(const char *form, ...)
{
    char text[4096];
    va_list values;
    va_start(values, form);
    vformat(text, sizeof text, form, values);
    va_end(values);
    put_output(text, length_of(text));
}

static void say_error_list(const char *form, va_list values, const char *more)
{
    char text[1024], line[1152];
    vformat(text, sizeof text, form, values);
    format(line, sizeof line, PROGRAM ": %s%s\n", text, more);
    write_all(2, line, length_of(line));
}

void say_error(const char *form, ...)
{
    va_list values;
    va_start(values, form);
    say_error_list(form, values, "");
    va_end(values);
}

static const char *error_text(long error)
{
    static const struct {
        int number;
        const char *text;
    } known[] = {{1, "Operation not permitted; run as root"},
                 {2, "No such file or directory"},
                 {5, "Input/output error"},
                 {11, "Resource temporarily unavailable"},
                 {12, "Cannot allocate memory"},
                 {13, "Permission denied; run as root"},
                 {16, "Device or resource busy"},
                 {19, "No such device"},
                 {22, "Invalid argument"},
                 {98, "Address already in use"},
                 {101, "Network is unreachable"},
                 {104, "Connection reset by peer"},
                 {110, "Connection timed out"},
                 {111, "Connection refused"},
                 {113, "No route to host"}};
    static char text[32];
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].number == -error)
            return known[i].text;
    format(text, sizeof text, "error %D", (i64)-error);
    return text;
}

_Noreturn void leave(int status)
{
    flush_output();
    for (;;)
        sys(__NR_exit_group, status);
}

_Noreturn void fail(long error, const char *form, ...)
{
    char more[160] = "";
    if (error)
        format(more, sizeof more, ": %s", error_text(error));
    va_list values;
    va_start(values, form);
    say_error_list(form, values, more);
    va_end(values);
    leave(1);
}

_Noreturn void wrong_call(const char *form, ...)
{
    va_list values;
    va_start(values, form);
    say_error_list(form, values, "; see " PROGRAM " --help");
    va_end(values);
    leave(2);
}

long open_file(const char *path, int flags) { return sys(__NR_openat, AT_FDCWD, path, flags | O_CLOEXEC, 0666); }

long read_file(const char *path, char *out, size_t size)
{
    long fd = open_file(path, O_RDONLY);
    out[0] = 0;
    if (fd < 0)
        return fd;
    long count = sys(__NR_read, fd, out, size - 1);
    sys(__NR_close, fd);
    if (count < 0)
        return count;
    if (count && out[count - 1] == '\n')
        count--;
    out[count] = 0;
    return count;
}

long write_file(const char *path, const char *text)
{
    long fd = open_file(path, O_WRONLY);
    if (fd < 0)
        return fd;
    long error = sys(__NR_write, fd, text, length_of(text));
    sys(__NR_close, fd);
    return error < 0 ? error : 0;
}

long write_all(int fd, const void *bytes, size_t size)
{
    const u8 *from = bytes;
    while (size) {
        long count = sys(__NR_write, fd, from, size);
        if (count == -4)
            continue;
        if (count < 0)
            return count;
        from += count, size -= (size_t)count;
    }
    return 0;
}

void *map_memory(size_t size)
{
    long address = sys(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address < 0 && address > -4096)
        fail(address, "no %U bytes of memory", (u64)size);
    memset((void *)address, 0, size); /* touch it: a page fault is not to be measured */
    return (void *)address;
}

u64 now_ns(void)
{
    struct __kernel_timespec time;
    sys(__NR_clock_gettime, CLOCK_MONOTONIC, &time, 0);
    return (u64)time.tv_sec * 1000000000u + (u64)time.tv_nsec;
}

int wait_readable(int fd, u64 deadline_ns)
{
    for (;;) {
        struct pollfd waiting = {.fd = fd, .events = POLLIN};
        long limit_ms = -1;
        if (deadline_ns) {
            u64 now = now_ns();
            limit_ms = now >= deadline_ns ? 0 : (long)((deadline_ns - now + 999999) / 1000000);
        }
        long count = sys(__NR_poll, &waiting, 1, limit_ms);
        if (count == 1)
            return 1;
        if (count == 0)
            return 0;
        if (count != -4)
            fail(count, "poll");
    }
}
