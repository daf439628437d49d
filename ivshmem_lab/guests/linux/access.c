/* info, read, write, ring, wait: one thing each, by hand or from a script. */
#include "device.h"
#include "options.h"

#include <asm/unistd.h>

static int shown;

static void show(struct device *device)
{
    char driver[64];
    driver_of(device, driver, sizeof driver);
    say("%s{\"bdf\": %j, \"kind\": %j, \"vectors\": %u, \"memory_bytes\": %U, \"driver\": %j", shown++ ? ", " : "",
        device->bdf, device->vectors ? "ivshmem-doorbell" : "ivshmem-plain", device->vectors, device->memory_bytes,
        driver);
    if (device->vectors)
        say(", \"peer_id\": %u", peer_id_of(device));
    say("}");
}

int run_info(int count, char **words)
{
    if (read_options(count, words, (struct option[]){{0}}))
        wrong_call("info takes no more words: %s", words[0]);
    say("{\"devices\": [");
    each_device(show);
    say("]}\n");
    return 0;
}

static void check_range(const struct device *device, u64 offset, u64 size)
{
    if (offset > device->memory_bytes || size > device->memory_bytes - offset)
        wrong_call("%U bytes at offset %U are not inside the %U bytes of shared memory", size, offset,
                   device->memory_bytes);
}

int run_read(int count, char **words)
{
    const char *bdf = 0;
    int raw = 0;
    struct device device;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf}, {"--raw", .flag = &raw}, {0}});
    if (count != 2)
        wrong_call("read takes OFFSET and LENGTH");
    u64 offset = need_number(words[0], "OFFSET", ~0ull), size = need_number(words[1], "LENGTH", ~0ull);
    find_device(&device, bdf);
    check_range(&device, offset, size);
    map_memory_of(&device);
    if (raw) {
        put_output(device.memory + offset, size);
        return 0;
    }
    say("{\"offset\": %U, \"bytes\": %U, \"hex\": \"", offset, size);
    for (u64 i = 0; i < size; i++) {
        u8 byte = device.memory[offset + i];
        char pair[2] = {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
        put_output(pair, 2);
    }
    say("\"}\n");
    return 0;
}

static int hex_digit(char c)
{
    u64 value;
    char text[4] = {'0', 'x', c, 0};
    return read_number(text, &value) ? (int)value : -1;
}

int run_write(int count, char **words)
{
    const char *bdf = 0, *hex = 0, *text = 0;
    int input = 0;
    struct device device;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf},
                                           {"--hex", .text = &hex},
                                           {"--text", .text = &text},
                                           {"--stdin", .flag = &input},
                                           {0}});
    if (count != 1 || !!hex + !!text + input != 1)
        wrong_call("write takes OFFSET and one of --hex, --text, --stdin");
    u64 offset = need_number(words[0], "OFFSET", ~0ull), size = 0;
    find_device(&device, bdf);
    check_range(&device, offset, 0);
    map_memory_of(&device);
    if (text) {
        size = length_of(text);
        check_range(&device, offset, size);
        memcpy(device.memory + offset, text, size);
    } else if (hex) {
        size = length_of(hex) / 2;
        check_range(&device, offset, size);
        for (size_t i = 0; hex[i]; i++)
            if (hex_digit(hex[i]) < 0 || length_of(hex) % 2)
                wrong_call("--hex %s is not pairs of hexadecimal digits", hex);
        for (u64 i = 0; i < size; i++)
            device.memory[offset + i] = (u8)(hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]));
    } else {
        static u8 block[65536];
        long part;
        while ((part = sys(__NR_read, 0, block, sizeof block)) > 0) {
            check_range(&device, offset + size, (u64)part);
            memcpy(device.memory + offset + size, block, (u64)part);
            size += (u64)part;
        }
    }
    say("{\"offset\": %U, \"bytes\": %U}\n", offset, size);
    return 0;
}

int run_ring(int count, char **words)
{
    const char *bdf = 0;
    u64 times = 1;
    struct device device;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf}, {"--count", .number = &times}, {0}});
    if (count != 2)
        wrong_call("ring takes PEER and VECTOR");
    u32 peer = (u32)need_number(words[0], "PEER", 65535), vector = (u32)need_number(words[1], "VECTOR", 65535);
    find_device(&device, bdf);
    if (!device.vectors)
        fail(0, "%s is an ivshmem-plain: it has no doorbell", device.bdf);
    map_registers(&device);
    u64 start_ns = now_ns();
    for (u64 i = 0; i < times; i++)
        ring(&device, peer, vector);
    say("{\"peer\": %u, \"vector\": %u, \"rings\": %U, \"total_ns\": %U}\n", peer, vector, times, now_ns() - start_ns);
    return 0;
}

int run_wait(int count, char **words)
{
    static struct interrupts interrupts;
    const char *bdf = 0;
    u64 wanted = 1, limit_s = 10, got = 0;
    struct device device;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf},
                                           {"--count", .number = &wanted},
                                           {"--timeout", .number = &limit_s},
                                           {0}});
    if (count != 1)
        wrong_call("wait takes VECTOR");
    u32 vector = (u32)need_number(words[0], "VECTOR", 65535);
    find_device(&device, bdf);
    take_interrupts(&device, &interrupts);
    if (vector >= interrupts.count)
        wrong_call("vector %u is not there: the device has %u", vector, interrupts.count);
    say_error("ready");
    u64 start_ns = now_ns(), deadline_ns = start_ns + limit_s * 1000000000u, more = 1;
    while (got < wanted && (more = wait_vector(&interrupts, vector, deadline_ns)))
        got += more;
    say("{\"vector\": %u, \"interrupts\": %U, \"total_ns\": %U}\n", vector, got, now_ns() - start_ns);
    if (got < wanted)
        fail(0, "%U of %U interrupts came in %U s", got, wanted, limit_s);
    return 0;
}
