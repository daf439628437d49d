/* Two guests, or a guest and the host, ring each other's doorbells: counts what is sent and taken, times round trips. */
#include "exchange.h"
#include "ivshmem.h"

static struct ivshmem device;
static struct mailbox *own;
static u32 sent, received, done;
static u32 min_cycles, mean_cycles;

static struct mailbox *mailbox_of(u32 peer_id)
{
    return (struct mailbox *)(device.memory + peer_id % MAILBOXES * LINE_BYTES);
}

static int is_ready(u32 peer_id)
{
    const struct mailbox *line = mailbox_of(peer_id);
    return line->owner == peer_id + 1 && line->state != STATE_ABSENT;
}

static u32 check_block(u32 target, u32 rounds, u32 log_offset)
{
    if (target == device.peer_id)
        return STATUS_SELF;
    if (!is_ready(target))
        return STATUS_NO_TARGET;
    if (log_offset && (log_offset % 4 || log_offset < MAILBOXES * LINE_BYTES || log_offset + 4ull * rounds > device.memory_bytes))
        return STATUS_BAD_LOG;
    return STATUS_OK;
}

/* sum / count; there is no 64-bit division without libgcc, and the mean of 32-bit values fits in 32 bits. */
static u32 mean(u64 sum, u32 count)
{
    u32 quotient, remainder;
    if (!count)
        return 0;
    __asm__("divl %4" : "=a"(quotient), "=d"(remainder) : "0"((u32)sum), "1"((u32)(sum >> 32)), "r"(count));
    return quotient;
}

static u32 run_block(u32 target, u32 rounds, u32 warmup, u32 log_offset)
{
    u32 status = check_block(target, rounds, log_offset);
    struct mailbox *other = mailbox_of(target);
    volatile u32 *log = log_offset ? (volatile u32 *)(device.memory + log_offset) : 0;
    u64 sum = 0;

    min_cycles = 0xFFFFFFFF;
    if (status)
        return status;
    other->reply_to = device.peer_id + 1;
    for (u32 round = 0; round - warmup != rounds; round++) {
        u32 start = (u32)rdtsc();
        ring(&device, target, 0);
        while (!take(0))
            wait_for_interrupt();
        u32 cycles = (u32)rdtsc() - start;
        sent++;
        received++;
        if (round < warmup)
            continue;
        if (log)
            *log++ = cycles;
        if (cycles < min_cycles)
            min_cycles = cycles;
        sum += cycles;
    }
    /* Two guests that answer each other would never stop. */
    other->reply_to = 0;
    mean_cycles = mean(sum, rounds);
    return STATUS_OK;
}

static void publish_counts(void)
{
    own->received = received;
    own->sent = sent;
}

static void run_command(void)
{
    u32 command = own->command;
    own->state = STATE_BUSY;
    own->status = run_block(own->target, own->rounds, own->warmup, own->log_offset);
    done = command;
    own->state = STATE_READY;
    u32 controller = own->controller;
    sent += controller != 0;
    publish_counts();
    own->done = command;
    if (controller)
        ring(&device, controller - 1, 0);
}

static void on_interrupt(u32 vector)
{
    received++;
    if (own->command != done) {
        run_command();
        return;
    }
    u32 reply_to = own->reply_to;
    sent += reply_to != 0;
    publish_counts();
    if (reply_to)
        ring(&device, reply_to - 1, vector);
}

static void __attribute__((noreturn)) answer_for_ever(void)
{
    u32 vectors = device.vectors < MAX_VECTORS ? device.vectors : MAX_VECTORS;
    for (;;) {
        u32 taken = 0;
        for (u32 vector = 0; vector < vectors; vector++)
            if (take(vector)) {
                on_interrupt(vector);
                taken = 1;
            }
        if (!taken)
            wait_for_interrupt();
    }
}

static void ping_by_itself(u32 peer, u32 rounds, u32 warmup, u32 log_offset)
{
    while (peer != device.peer_id && !is_ready(peer))
        cpu_pause();
    own->target = peer;
    own->rounds = rounds;
    own->warmup = warmup;
    own->log_offset = log_offset;
    own->state = STATE_BUSY;
    u32 status = own->status = run_block(peer, rounds, warmup, log_offset);
    publish_counts();
    own->state = STATE_READY;
    if (status) {
        print("pingpong: status=%u\n", status);
        debug_exit(EXIT_FAILED);
    }
    print("pingpong: rounds=%u sent=%u received=%u min_cycles=%u mean_cycles=%u\n", rounds, sent, received, min_cycles,
          mean_cycles);
}

void program(void)
{
    const char *role = "pong";
    u32 peer = 0, rounds = 1000, warmup = 100, log_offset = 0, leave = 0;
    const struct option options[] = {
        {"role", 0, &role},         {"peer", &peer, 0},      {"rounds", &rounds, 0},
        {"warmup", &warmup, 0},     {"log", &log_offset, 0}, {"exit", &leave, 0},
    };

    parse_command_line(options, sizeof options / sizeof options[0]);
    int pings = same_text(role, "ping");
    if (!pings && !same_text(role, "pong")) {
        print("pingpong: role=%s is not ping or pong\n", role);
        debug_exit(EXIT_FAILED);
    }
    ivshmem_open(&device, "pingpong");
    if (device.memory_bytes < MAILBOXES * LINE_BYTES) {
        print("pingpong: memory=%u is less than the mailboxes' 65536\n", device.memory_bytes);
        debug_exit(EXIT_FAILED);
    }
    own = mailbox_of(device.peer_id);
    clear_line(own);
    own->owner = device.peer_id + 1;
    own->state = STATE_READY;
    print("pingpong: peer_id=%u vectors=%u memory=%u\nready\n", device.peer_id, device.vectors, device.memory_bytes);
    if (pings) {
        ping_by_itself(peer, rounds, warmup, log_offset);
        if (leave)
            debug_exit(EXIT_OK);
    }
    answer_for_ever();
}
