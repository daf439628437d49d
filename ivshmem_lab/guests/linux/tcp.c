/* tcp-pingpong, tcp-stream: the same two measurements over a network, to compare with. */
#include "measure.h"
#include "options.h"

#include <asm/unistd.h>
#include <linux/in.h>
#include <linux/tcp.h>

enum { STREAM_SOCKET = 1, CLOSE_ON_EXEC = 02000000, SOCKET_LEVEL = 1, REUSE_ADDRESS = 2 };

static void read_address(const char *text, u64 port, struct sockaddr_in *address)
{
    u8 *bytes = (u8 *)&address->sin_addr;
    int part = 0, value = -1;
    for (const char *at = text;; at++) {
        if (*at >= '0' && *at <= '9' && value < 256) {
            value = (value < 0 ? 0 : value * 10) + *at - '0';
            continue;
        }
        if (value < 0 || value > 255 || part == 4 || (*at && *at != '.'))
            break;
        bytes[part++] = (u8)value;
        value = -1;
        if (!*at)
            break;
    }
    if (part != 4 || port > 65535)
        wrong_call("%s, port %U is no IPv4 address and port", text, port);
    address->sin_family = 2;
    address->sin_port = (u16)(port << 8 | port >> 8);
}

static int connect_or_accept(const char *to, u64 port)
{
    struct sockaddr_in address = {0};
    int one = 1;
    read_address(to ? to : "0.0.0.0", port, &address);
    long fd = sys(__NR_socket, 2, STREAM_SOCKET | CLOSE_ON_EXEC, 0), error;
    if (fd < 0)
        fail(fd, "socket");
    if (to) {
        error = sys(__NR_connect, fd, &address, sizeof address);
        if (error)
            fail(error, "connecting to %s, port %U", to, port);
    } else {
        sys(__NR_setsockopt, fd, SOCKET_LEVEL, REUSE_ADDRESS, &one, sizeof one);
        error = sys(__NR_bind, fd, &address, sizeof address);
        error = error ? error : sys(__NR_listen, fd, 1);
        if (error)
            fail(error, "listening on port %U", port);
        say_error("ready");
        long accepted = sys(__NR_accept4, fd, 0, 0, CLOSE_ON_EXEC);
        sys(__NR_close, fd);
        if (accepted < 0)
            fail(accepted, "accept");
        fd = accepted;
    }
    sys(__NR_setsockopt, fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return (int)fd;
}

static void read_all(int fd, void *to, size_t size)
{
    u8 *at = to;
    while (size) {
        long count = sys(__NR_read, fd, at, size);
        if (count <= 0)
            fail(count, "the other side ended with %U bytes missing", (u64)size);
        at += count, size -= (size_t)count;
    }
}

static const char *other_side(int count, char **words, const char *what)
{
    if (count == 1 && same(words[0], "serve"))
        return 0;
    if (count == 2 && same(words[0], "connect"))
        return words[1];
    wrong_call("%s takes serve, or connect and ADDRESS", what);
}

int run_tcp_pingpong(int count, char **words)
{
    u64 port = 7000, rounds = 1000, warmup = 100;
    int samples = 0;
    struct trips trips;
    count = read_options(count, words,
                         (struct option[]){{"--port", .number = &port},
                                           {"--rounds", .number = &rounds},
                                           {"--warmup", .number = &warmup},
                                           {"--samples", .flag = &samples},
                                           {0}});
    const char *to = other_side(count, words, "tcp-pingpong");
    if (rounds > 10000000 || warmup > 10000000)
        wrong_call("at most 10000000 rounds");
    begin_trips(&trips, rounds);
    int fd = connect_or_accept(to, port);
    u8 byte = 1;
    u64 start_ns = 0;
    for (u64 round = 0; round < warmup + rounds; round++) {
        u64 now = now_ns();
        if (round == warmup)
            start_ns = now;
        long error = to ? write_all(fd, &byte, 1) : 0;
        if (error)
            fail(error, "write");
        read_all(fd, &byte, 1);
        if (!to && (error = write_all(fd, &byte, 1)))
            fail(error, "write");
        if (round >= warmup)
            note_trip(&trips, now_ns() - now);
    }
    say("{\"role\": %j, \"rounds\": %U, \"warmup\": %U, \"total_ns\": %U", to ? "ping" : "pong", rounds, warmup,
        now_ns() - start_ns);
    if (to && rounds) {
        say(", ");
        say_trips(&trips, samples);
    }
    say("}\n");
    return 0;
}

int run_tcp_stream(int count, char **words)
{
    u64 port = 7000, bytes = 64 << 20, message = 64 << 10;
    count = read_options(count, words,
                         (struct option[]){{"--port", .number = &port},
                                           {"--bytes", .number = &bytes},
                                           {"--message", .number = &message},
                                           {0}});
    const char *to = other_side(count, words, "tcp-stream");
    if (message < 16 || message % 8 || message > 1 << 20 || !bytes || bytes % message)
        wrong_call("--message is a multiple of 8 from 16 to 1M, and --bytes a multiple of it");
    u8 *block = map_memory(message);
    u64 blocks = bytes / message;
    struct sums sums = {0, 0};
    fill_block(block, message, 0);
    int fd = connect_or_accept(to, port);
    u64 start_ns = 0;
    for (u64 number = 0; number < blocks; number++) {
        if (to) {
            *(u64 *)block = number;
            long error = write_all(fd, block, message);
            if (error)
                fail(error, "write");
        } else {
            read_all(fd, block, message);
            add_block(&sums, block, message);
        }
        if (!number) {
            u8 byte = 1; /* the first block is not timed */
            if (to)
                read_all(fd, &byte, 1);
            else
                write_all(fd, &byte, 1);
            start_ns = now_ns();
        }
    }
    u8 byte = 1;
    if (to)
        read_all(fd, &byte, 1);
    else
        write_all(fd, &byte, 1);
    u64 total_ns = now_ns() - start_ns;
    if (to)
        sums = sums_of(blocks, message, block);
    say("{\"role\": %j, \"bytes\": %U, \"timed_bytes\": %U, \"message_bytes\": %U, \"checksum\": \"%X-%X\", "
        "\"total_ns\": %U}\n",
        to ? "send" : "receive", bytes, bytes - message, message, sums.first, sums.second, total_ns);
    return 0;
}
