/* stream: bytes through a channel in the shared memory (channel.h), written, read and checked in phases that are timed apart. */
#include "../src/channel.h"
#include "device.h"
#include "measure.h"
#include "options.h"

#include <asm/unistd.h>

struct side {
    struct device device;
    struct interrupts interrupts;
    struct channel_end end;
    int by_interrupt;
    u64 vector, limit_s;
    u64 wait_ticks, waits;
};

static const char *const reasons[] = {"",
                                      "the size is not allowed",
                                      "the other side has closed it",
                                      "its header is another channel's",
                                      "its counters cannot be right",
                                      "a record cannot be right"};

static void check(struct side *side)
{
    if (side->end.error)
        fail(0, "the channel is broken: %s", reasons[side->end.error]);
}

static void ring_other(struct side *side, u32 number)
{
    if (number && side->device.vectors)
        ring(&side->device, number - 1, (u32)side->vector);
}

/* One step of waiting for the other side: for its doorbell, or for a moment. */
static void wait_step(struct side *side, u64 deadline_ns)
{
    u64 start = ticks();
    u64 now = now_ns();
    if (now > deadline_ns)
        fail(0, "nothing moved for %U s; is the other side there?", side->limit_s);
    if (side->by_interrupt)
        wait_vector(&side->interrupts, (u32)side->vector, now + 100000000u); /* and look again, whatever happens */
    else
        sys(__NR_sched_yield, 0);
    side->wait_ticks += ticks() - start;
    side->waits++;
}

static u64 deadline(const struct side *side) { return now_ns() + side->limit_s * 1000000000u; }

static void *reserve(struct side *side, u32 size)
{
    void *room = channel_reserve(&side->end, size);
    if (room)
        return room;
    for (u64 limit = deadline(side); !(room = channel_reserve(&side->end, size)); wait_step(side, limit))
        check(side);
    return room;
}

static const void *peek(struct side *side, u32 *size)
{
    const void *message = channel_peek(&side->end, size);
    if (message)
        return message;
    for (u64 limit = deadline(side); !(message = channel_peek(&side->end, size)); wait_step(side, limit)) {
        if (side->end.error == CHANNEL_CLOSED)
            return 0;
        check(side);
    }
    return message;
}

struct clock {
    u64 start_ticks, start_ns;
};

static u64 in_ns(const struct clock *clock, u64 ticks_there, u64 end_ticks, u64 end_ns)
{
    u64 all = end_ticks - clock->start_ticks;
    return all ? (u64)((double)ticks_there * (double)(end_ns - clock->start_ns) / (double)all) : 0;
}

static void send(struct side *side, u64 blocks, u32 size)
{
    u8 *block = map_memory(size);
    u64 write_ticks = 0;
    fill_block(block, size, 0);
    memcpy(reserve(side, size), block, size); /* the first block also waits for the receiver; it is not timed */
    channel_commit(&side->end, size);
    ring_other(side, channel_sender_rings(&side->end));
    for (u64 limit = deadline(side); side->end.tail != side->end.head; wait_step(side, limit)) {
        check(side);
        channel_reserve(&side->end, 0); /* looks at the receiver's words */
    }
    side->wait_ticks = side->waits = 0;
    struct clock clock = {ticks(), now_ns()};
    for (u64 number = 1; number < blocks; number++) {
        *(u64 *)block = number;
        void *room = reserve(side, size);
        u64 before = ticks();
        memcpy(room, block, size);
        channel_commit(&side->end, size);
        write_ticks += ticks() - before;
        ring_other(side, channel_sender_rings(&side->end));
    }
    for (u64 limit = deadline(side); side->end.tail != side->end.head; wait_step(side, limit)) {
        check(side);
        channel_reserve(&side->end, 0);
    }
    u64 end_ticks = ticks(), end_ns = now_ns();
    channel_close_sender(&side->end);
    ring_other(side, channel_sender_rings(&side->end));
    struct sums sums = sums_of(blocks, size, block);
    say("{\"role\": \"send\", \"bytes\": %U, \"timed_bytes\": %U, \"message_bytes\": %u, \"checksum\": \"%X-%X\", "
        "\"total_ns\": %U, \"write_ns\": %U, \"wait_ns\": %U, \"waits\": %U}\n",
        blocks * size, (blocks - 1) * size, size, sums.first, sums.second, end_ns - clock.start_ns,
        in_ns(&clock, write_ticks, end_ticks, end_ns), in_ns(&clock, side->wait_ticks, end_ticks, end_ns), side->waits);
}

/* A session that is closed and was read to its end is an earlier run's: wait for the next one. */
static void wait_for_session(struct side *side)
{
    struct channel_area *area = side->end.area;
    u32 session = area->sender.session;
    if (!session || !area->sender.closed || area->receiver.session != session || area->receiver.tail != area->sender.head)
        return;
    for (u64 limit = deadline(side); area->sender.session == session || !area->sender.session;)
        wait_step(side, limit);
}

static void receive(struct side *side)
{
    wait_for_session(side);
    u32 most = channel_longest(&side->end), size;
    u8 *block = map_memory(most + 8);
    u64 bytes = 0, messages = 0, read_ticks = 0, verify_ticks = 0;
    struct sums sums = {0, 0};
    struct clock clock = {ticks(), now_ns()};
    const void *message;
    while ((message = peek(side, &size))) {
        u64 before = ticks();
        if (!messages++)
            side->wait_ticks = side->waits = 0, clock = (struct clock){before, now_ns()};
        memcpy(block, message, size);
        u64 after = ticks();
        if (channel_release(&side->end))
            ring_other(side, channel_receiver_rings(&side->end));
        u64 rung = ticks();
        add_block(&sums, block, size);
        verify_ticks += ticks() - rung;
        read_ticks += after - before;
        bytes += size;
    }
    u64 end_ticks = ticks(), end_ns = now_ns();
    say("{\"role\": \"receive\", \"bytes\": %U, \"messages\": %U, \"checksum\": \"%X-%X\", \"total_ns\": %U, "
        "\"read_ns\": %U, \"verify_ns\": %U, \"wait_ns\": %U, \"waits\": %U}\n",
        bytes, messages, sums.first, sums.second, end_ns - clock.start_ns,
        in_ns(&clock, read_ticks, end_ticks, end_ns), in_ns(&clock, verify_ticks, end_ticks, end_ns),
        in_ns(&clock, side->wait_ticks, end_ticks, end_ns), side->waits);
}

int run_stream(int count, char **words)
{
    static struct side side;
    const char *bdf = 0;
    u64 offset = 0, ring_bytes = 1 << 20, bytes = 64 << 20, message = 64 << 10;
    int poll = 0;
    side.limit_s = 10;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf},
                                           {"--offset", .number = &offset},
                                           {"--ring", .number = &ring_bytes},
                                           {"--bytes", .number = &bytes},
                                           {"--message", .number = &message},
                                           {"--vector", .number = &side.vector},
                                           {"--timeout", .number = &side.limit_s},
                                           {"--poll", .flag = &poll},
                                           {0}});
    if (count != 1 || !(same(words[0], "send") || same(words[0], "receive")))
        wrong_call("stream takes send or receive");
    int sends = same(words[0], "send");
    find_device(&side.device, bdf);
    if (ring_bytes < 256 || ring_bytes > 1u << 31 || ring_bytes & (ring_bytes - 1))
        wrong_call("--ring %U is no power of two from 256 to 2G", ring_bytes);
    u64 area = ring_bytes + CHANNEL_HEADER;
    if (offset % 64 || area > side.device.memory_bytes || offset > side.device.memory_bytes - area)
        wrong_call("a channel of %U bytes at offset %U is not inside the %U bytes of shared memory at a multiple of 64",
                   area, offset, side.device.memory_bytes);
    if (sends && (message < 16 || message % 8 || message > ring_bytes / 2 - CHANNEL_RECORD))
        wrong_call("--message %U is not allowed: a multiple of 8 from 16 to %U", message,
                   (ring_bytes / 2 - CHANNEL_RECORD) & ~7ull);
    if (sends && (!bytes || bytes % message))
        wrong_call("--bytes %U is not a multiple of --message %U", bytes, message);
    map_memory_of(&side.device);
    u32 own = 0;
    if (side.device.vectors) {
        if (poll)
            map_registers(&side.device); /* the other side may want to be rung */
        else {
            take_interrupts(&side.device, &side.interrupts);
            if (side.vector >= side.interrupts.count)
                wrong_call("vector %U is not there: the device has %u", side.vector, side.interrupts.count);
            own = side.device.registers[REG_POSITION / 4] + 1;
        }
    }
    side.by_interrupt = own != 0;
    void *at = side.device.memory + offset;
    if (!(sends ? channel_open_sender(&side.end, at, (u32)area, own)
                : channel_open_receiver(&side.end, at, (u32)area, own)))
        check(&side);
    say_error("ready");
    if (sends)
        send(&side, bytes / message, (u32)message);
    else
        receive(&side);
    return 0;
}
