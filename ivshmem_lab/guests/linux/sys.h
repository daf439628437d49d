/* What the tool needs of an operating system, without a C library: system calls of Linux on x86-64, text, memory, errors.
 * So the program is small, static, and the same on every distribution. Needs the kernel's own headers to build. */
#ifndef SYS_H
#define SYS_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int32_t i32;
typedef uint64_t u64;
typedef int64_t i64;

#define PROGRAM "ivshmem-tool"

long sys6(long number, long a, long b, long c, long d, long e, long f);
#define sys(number, ...) SYS_PICK(__VA_ARGS__, 0, 0, 0, 0, 0, 0)(number, __VA_ARGS__)
#define SYS_PICK(...) SYS_CALL
#define SYS_CALL(number, ...) SYS_FILL(number, __VA_ARGS__, 0, 0, 0, 0, 0, 0)
#define SYS_FILL(number, a, b, c, d, e, f, ...) \
    sys6(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

/* text */
size_t length_of(const char *text);
int same(const char *a, const char *b);
int starts_with(const char *text, const char *beginning);
/* "4096", "0x1000", "64K", "256M"; the whole text, or it is no number. True when it is one. */
int read_number(const char *text, u64 *value);

/* %s text, %d %u %x 32 bits, %D %U %X 64 bits, %j text as a JSON string, %% */
void vformat(char *out, size_t size, const char *format, va_list values);
void format(char *out, size_t size, const char *format, ...);
void say(const char *format, ...);      /* to standard output, kept until flush_output() */
void say_error(const char *format, ...); /* a line to standard error, at once */
void put_output(const void *bytes, size_t size);
void flush_output(void);

/* Ends the program: 1 failed, 2 wrong call. `error` is a negative errno, or 0 for none. */
_Noreturn void fail(long error, const char *format, ...);
_Noreturn void wrong_call(const char *format, ...);
_Noreturn void leave(int status);

/* files, memory, time */
long open_file(const char *path, int flags);
long read_file(const char *path, char *out, size_t size); /* at most size - 1 bytes and a 0; the line's end is cut */
long write_file(const char *path, const char *text);
long write_all(int fd, const void *bytes, size_t size); /* 0, or a negative errno */
void *map_memory(size_t size); /* zeroes of our own */
u64 now_ns(void);
static inline u64 ticks(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}
/* Waits until a descriptor is readable; 1, or 0 when the time (ns from now_ns(); 0 = none) is over. */
int wait_readable(int fd, u64 deadline_ns);

void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);

#endif
