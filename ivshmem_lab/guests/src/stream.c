/* Moves bytes through a single-producer, single-consumer ring of chunks in shared memory, with a checksum on both sides. */
#include "exchange.h"
#include "ivshmem.h"

#define CHUNK_STRIDE 0x9E3779B1u /* what the first word of the pattern advances by from chunk to chunk */
#define UNROLLED_BYTES 64

typedef u32 lanes __attribute__((vector_size(16)));

static struct ivshmem device;
static struct producer_line *producer;
static struct consumer_line *consumer;
static u32 chunk_bytes, slots, total_chunks, data;

static void __attribute__((noreturn)) fail(const char *why)
{
    print("stream: %s\n", why);
    debug_exit(EXIT_FAILED);
}

ALWAYS_INLINE u32 rotate_left(u32 value, u32 bits) { return value << bits | value >> (32 - bits); }

/* Four words, lane by lane modulo 2^32, folded so that the lanes cannot be exchanged. */
static u32 fold(lanes sum)
{
    return sum[0] ^ rotate_left(sum[1], 8) ^ rotate_left(sum[2], 16) ^ rotate_left(sum[3], 24);
}

static u32 write_chunk(lanes *to, u32 first)
{
    lanes value = {first, first + 1, first + 2, first + 3};
    lanes sum = {0, 0, 0, 0};
    const lanes four = {4, 4, 4, 4};
    const lanes *end = to + chunk_bytes / sizeof(lanes);
    for (; to != end; to += UNROLLED_BYTES / sizeof(lanes)) {
#pragma GCC unroll 4
        for (u32 i = 0; i < UNROLLED_BYTES / sizeof(lanes); i++) {
            to[i] = value;
            sum += value;
            value += four;
        }
    }
    compiler_barrier();
    return fold(sum);
}

static u32 read_chunk(const lanes *from)
{
    lanes sum = {0, 0, 0, 0};
    const lanes *end = from + chunk_bytes / sizeof(lanes);
    compiler_barrier();
    for (; from != end; from += UNROLLED_BYTES / sizeof(lanes)) {
#pragma GCC unroll 4
        for (u32 i = 0; i < UNROLLED_BYTES / sizeof(lanes); i++)
            sum += from[i];
    }
    return fold(sum);
}

static lanes *slot(u32 chunk) { return (lanes *)(data + chunk % slots * chunk_bytes); }

static void store_cycles(volatile u32 *words, u64 cycles)
{
    words[0] = (u32)cycles;
    words[1] = (u32)(cycles >> 32);
}

/* Sleep unless vector 0 was taken since its count was `rung`: the caller looked at the other side after reading that count. */
static void sleep_unless_rung_since(u32 rung)
{
    disable_interrupts();
    if (irq_count[0] == rung)
        wait_for_interrupt();
    enable_interrupts();
}

static void check_shape(u32 ring_offset)
{
    if (!chunk_bytes || chunk_bytes % UNROLLED_BYTES || !slots)
        fail("chunk must be a multiple of 64 bytes and slots at least 1");
    if (ring_offset + (u64)RING_DATA + (u64)chunk_bytes * slots > device.memory_bytes)
        fail("the ring does not fit into the shared memory");
}

static u32 produce(u32 session, u32 seed)
{
    u32 checksum = 0, head = 0, tail = 0;
    u64 write_cycles = 0;

    clear_line(producer);
    producer->producer = device.peer_id + 1;
    producer->chunk_bytes = chunk_bytes;
    producer->slots = slots;
    producer->total_chunks = total_chunks;
    producer->session = session;
    while (consumer->session != session)
        cpu_pause();
    u32 other = consumer->consumer - 1;

    u64 start = rdtsc();
    while (tail != total_chunks) {
        u32 rung = irq_count[0];
        tail = consumer->tail;
        if (head - tail > slots)
            fail("the consumer's tail is not between the chunks in flight");
        if (head == total_chunks || head - tail == slots) {
            if (tail != total_chunks)
                sleep_unless_rung_since(rung);
            continue;
        }
        u64 before = rdtsc();
        u32 folded = write_chunk(slot(head), seed + head * CHUNK_STRIDE);
        write_cycles += rdtsc() - before;
        checksum = rotate_left(checksum, 1) ^ folded;
        producer->checksum = checksum;
        producer->head = ++head;
        ring(&device, other, 0);
    }
    store_cycles(producer->write_cycles, write_cycles);
    store_cycles(producer->total_cycles, rdtsc() - start);
    return checksum;
}

static u32 consume(u32 session, u32 ring_offset)
{
    u32 checksum = 0, tail = 0;
    u64 read_cycles = 0;

    clear_line(consumer);
    consumer->consumer = device.peer_id + 1;
    consumer->session = session;
    while (producer->session != session)
        cpu_pause();
    /* Read once: the other side is not trusted to leave them alone. */
    u32 other = producer->producer - 1;
    chunk_bytes = producer->chunk_bytes;
    slots = producer->slots;
    total_chunks = producer->total_chunks;
    check_shape(ring_offset);
    u32 half = slots > 1 ? slots / 2 : 1;

    u64 start = rdtsc();
    while (tail != total_chunks) {
        u32 rung = irq_count[0];
        u32 ready = producer->head - tail;
        if (ready > slots)
            fail("the producer's head is not between the chunks in flight");
        if (!ready) {
            sleep_unless_rung_since(rung);
            continue;
        }
        u64 before = rdtsc();
        u32 folded = read_chunk(slot(tail));
        read_cycles += rdtsc() - before;
        checksum = rotate_left(checksum, 1) ^ folded;
        consumer->checksum = checksum;
        tail++;
        if (tail == total_chunks) {
            store_cycles(consumer->read_cycles, read_cycles);
            store_cycles(consumer->total_cycles, rdtsc() - start);
            consumer->finished = 1;
        }
        consumer->tail = tail;
        if (tail % half == 0 || tail == total_chunks)
            ring(&device, other, 0);
    }
    return checksum;
}

void program(void)
{
    const char *role = "";
    u32 bytes = 64 << 20, session = 1, ring_offset = 1 << 20, chunk = 64 << 10, slot_count = 16, seed = 1, leave = 0;
    const struct option options[] = {
        {"role", 0, &role},      {"bytes", &bytes, 0},      {"session", &session, 0}, {"ring", &ring_offset, 0},
        {"chunk", &chunk, 0},    {"slots", &slot_count, 0}, {"seed", &seed, 0},       {"exit", &leave, 0},
    };

    parse_command_line(options, sizeof options / sizeof options[0]);
    int produces = same_text(role, "producer");
    if (!produces && !same_text(role, "consumer"))
        fail("role must be producer or consumer");
    if (!session)
        fail("session 0 means no session");
    if (ring_offset % LINE_BYTES)
        fail("ring must be a multiple of 64 bytes");
    ivshmem_open(&device, "stream");
    if ((u64)ring_offset + RING_DATA > device.memory_bytes)
        fail("the ring does not fit into the shared memory");
    producer = (struct producer_line *)(device.memory + ring_offset);
    consumer = (struct consumer_line *)(device.memory + ring_offset + LINE_BYTES);
    data = device.memory + ring_offset + RING_DATA;
    print("stream: peer_id=%u vectors=%u memory=%u\nready\n", device.peer_id, device.vectors, device.memory_bytes);

    /* Interrupts are taken while chunks are copied: an emulator that has to hold one back runs slowly until it may not. */
    enable_interrupts();
    u32 checksum;
    if (produces) {
        chunk_bytes = chunk;
        slots = slot_count;
        check_shape(ring_offset);
        if (bytes % chunk_bytes)
            fail("bytes must be a multiple of chunk");
        total_chunks = bytes / chunk_bytes;
        checksum = produce(session, seed);
    } else {
        checksum = consume(session, ring_offset);
    }
    print("stream: role=%s chunks=%u checksum=0x%8x\n", role, total_chunks, checksum);
    if (leave)
        debug_exit(EXIT_OK);
    halt_for_ever();
}
