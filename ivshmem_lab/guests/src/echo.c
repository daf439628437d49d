/* Answers each message of one channel through another: the bytes that came, each XORed with `xor`. Doorbell wake-up. */
#include "channel.h"
#include "ivshmem.h"

#define DEFAULT_AREA (CHANNEL_HEADER + 65536u)

static struct ivshmem device;
static u32 area_bytes = DEFAULT_AREA, vector, mask;
static struct channel_end in, out;
static u32 messages, bytes;

static void __attribute__((noreturn)) fail(const char *side, u32 error)
{
    print("echo: channel=%s error=%u\n", side, error);
    debug_exit(EXIT_FAILED);
}

static void *area_at(const char *side, u32 offset)
{
    if (offset % 64 || offset > device.memory_bytes || area_bytes > device.memory_bytes - offset)
        fail(side, CHANNEL_BAD_SIZE);
    return (void *)(device.memory + offset);
}

static void ring_if_any(u32 number)
{
    if (number)
        ring(&device, number - 1, vector);
}

/* Called with IF = 0 after the caller looked and found nothing: an interrupt since then ends the wait at once. */
static void wait_for_doorbell(void)
{
    if (!take(vector))
        wait_for_interrupt();
}

static void begin_answers(void *area)
{
    if (!channel_open_sender(&out, area, area_bytes, device.peer_id + 1))
        fail("out", out.error);
}

static void answer(const u32 *message, u32 length, void *out_area)
{
    u32 *room;
    while (!(room = channel_reserve(&out, length))) {
        if (out.error == CHANNEL_CLOSED)
            begin_answers(out_area); /* for the next receiver */
        else if (out.error)
            fail("out", out.error);
        else
            wait_for_doorbell();
    }
    /* In words: both sides are padded to 16 bytes within their rings. */
    for (u32 i = 0; i < (length + 3) / 4; i++)
        room[i] = message[i] ^ mask;
    if (!channel_commit(&out, length))
        fail("out", out.error);
    ring_if_any(channel_sender_rings(&out));
}

/* Until the sender closes, or begins anew. */
static void serve_session(void *in_area, void *out_area)
{
    u32 length;
    if (!channel_open_receiver(&in, in_area, area_bytes, device.peer_id + 1))
        fail("in", in.error);
    while (!in.error) {
        const void *message = channel_peek(&in, &length);
        if (message) {
            answer(message, length, out_area);
            messages++;
            bytes += length;
            if (channel_release(&in))
                ring_if_any(channel_receiver_rings(&in));
        } else if (!in.error) {
            wait_for_doorbell();
        }
    }
    if (in.error != CHANNEL_CLOSED)
        fail("in", in.error);
}

/* A closed session stays in the memory: wait until its sender begins another. */
static void wait_for_next_session(u32 last)
{
    while (in.area->sender.session == last)
        wait_for_doorbell();
}

void program(void)
{
    u32 in_offset = 0, out_offset = 0, xor = 0, leave = 0;
    const struct option options[] = {
        {"in", &in_offset, 0}, {"out", &out_offset, 0}, {"size", &area_bytes, 0},
        {"xor", &xor, 0},      {"vector", &vector, 0},  {"exit", &leave, 0},
    };

    parse_command_line(options, sizeof options / sizeof options[0]);
    ivshmem_open(&device, "echo");
    if (vector >= device.vectors || vector >= MAX_VECTORS) {
        print("echo: vector=%u is not there, vectors=%u\n", vector, device.vectors);
        debug_exit(EXIT_FAILED);
    }
    mask = (xor & 255) * 0x01010101u;
    out_offset = out_offset ? out_offset : in_offset + area_bytes;
    void *in_area = area_at("in", in_offset), *out_area = area_at("out", out_offset);
    begin_answers(out_area);
    print("echo: peer_id=%u in=%u out=%u size=%u\nready\n", device.peer_id, in_offset, out_offset, area_bytes);
    for (;;) {
        serve_session(in_area, out_area);
        print("echo: session=%u messages=%u bytes=%u\n", in.session, messages, bytes);
        if (leave) {
            channel_close_sender(&out);
            ring_if_any(channel_sender_rings(&out));
            debug_exit(EXIT_OK);
        }
        wait_for_next_session(in.session);
    }
}
