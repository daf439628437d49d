/* A channel: messages through shared memory, one sender, one receiver, one ring. For guests and for programs on the host;
 * the Python side is ivshmem_lab/peer/channel.py, where the layout is told in full.
 *
 * Needs no library and no other header; x86 only, which keeps the order of stores. No locked instruction, no fence: each word
 * has one writer, a record is written before `head`, and the doorbell is rung after it. Ringing and waiting are the caller's:
 *   sender:   p = channel_reserve(&s, n); fill p; channel_commit(&s, n); ring(channel_sender_rings(&s))
 *   receiver: p = channel_peek(&r, &n); use p; if (channel_release(&r)) ring(channel_receiver_rings(&r))
 * Whoever gets 0 and no error waits for its doorbell with interrupts off and looks again.
 *
 * All that the other side wrote is read once and checked; an error stays in `error` and every later call gives 0.
 */
#ifndef CHANNEL_H
#define CHANNEL_H

typedef unsigned char channel_u8;
typedef unsigned int channel_u32;

#define CHANNEL_MAGIC 0x48435649u /* "IVCH" */
#define CHANNEL_VERSION 1u
#define CHANNEL_HEADER 128u /* from the area's start to the ring */
#define CHANNEL_RECORD 16u  /* header and alignment of a record */
#define CHANNEL_SKIP 0xFFFFFFFFu
#define CHANNEL_INLINE static inline __attribute__((always_inline))

struct channel_sender_line {
    volatile channel_u32 magic, version;
    volatile channel_u32 data_bytes; /* of the ring: a power of two, 256 to 2^31 */
    volatile channel_u32 peer;       /* peer id + 1; 0 = is not rung */
    volatile channel_u32 head;       /* bytes written since the session began, modulo 2^32 */
    volatile channel_u32 closed;
    volatile channel_u32 session; /* written last */
    volatile channel_u32 reserved[9];
};

struct channel_receiver_line {
    volatile channel_u32 magic, peer;
    volatile channel_u32 tail; /* bytes read since the session began */
    volatile channel_u32 closed;
    volatile channel_u32 session; /* the sender's that this line belongs to; written last */
    volatile channel_u32 reserved[11];
};

struct channel_area {
    struct channel_sender_line sender;
    struct channel_receiver_line receiver;
    channel_u8 ring[];
};

struct channel_record {
    volatile channel_u32 length, position, session, zero;
};

/* two lines of 64 bytes; C99 has no _Static_assert */
typedef char channel_area_has_128_bytes[sizeof(struct channel_area) == CHANNEL_HEADER ? 1 : -1];

enum channel_error {
    CHANNEL_OK,
    CHANNEL_BAD_SIZE,   /* ours: not a power of two, or a message that is too long */
    CHANNEL_CLOSED,     /* the other side has closed, or begun anew */
    CHANNEL_BAD_HEADER, /* magic, version or data_bytes */
    CHANNEL_BAD_COUNT,  /* head or tail */
    CHANNEL_BAD_RECORD,
};

struct channel_end {
    struct channel_area *area;
    channel_u32 bytes;         /* of the ring, ours: never read from the memory */
    channel_u32 head, tail;    /* as far as this side knows */
    channel_u32 session;       /* 0: not joined */
    channel_u32 peer;          /* own peer id + 1, or 0 */
    channel_u32 start, length; /* reserved: start and room; peeked: the tail after it, and 1 */
    enum channel_error error;
};

CHANNEL_INLINE void channel_order(void) { __asm__ volatile("" ::: "memory"); }

CHANNEL_INLINE channel_u32 channel_longest(const struct channel_end *end) { return end->bytes / 2 - CHANNEL_RECORD; }

CHANNEL_INLINE channel_u32 channel_need(channel_u32 length) { return CHANNEL_RECORD + ((length + 15u) & ~15u); }

CHANNEL_INLINE void *channel_fail(struct channel_end *end, enum channel_error error)
{
    end->error = error;
    return 0;
}

CHANNEL_INLINE int channel_init(struct channel_end *end, void *area, channel_u32 area_bytes, channel_u32 peer)
{
    channel_u32 bytes = area_bytes - CHANNEL_HEADER;
    *end = (struct channel_end){.area = area, .bytes = bytes, .peer = peer};
    if (area_bytes < CHANNEL_HEADER || bytes < 256 || bytes > 1u << 31 || bytes & (bytes - 1))
        end->error = CHANNEL_BAD_SIZE;
    return end->error == CHANNEL_OK;
}

CHANNEL_INLINE void channel_write_record(struct channel_end *end, channel_u32 position, channel_u32 length)
{
    struct channel_record *record = (struct channel_record *)(end->area->ring + (position & (end->bytes - 1)));
    record->length = length;
    record->position = position;
    record->session = end->session;
    record->zero = 0;
}

/* Begins a new session; `peer` is the own peer id + 1, or 0 for one that is not rung. True when it could. */
CHANNEL_INLINE int channel_open_sender(struct channel_end *end, void *area, channel_u32 area_bytes, channel_u32 peer)
{
    if (!channel_init(end, area, area_bytes, peer))
        return 0;
    struct channel_sender_line *line = &end->area->sender;
    channel_u32 session = line->session + 1;
    line->session = 0;
    line->magic = CHANNEL_MAGIC;
    line->version = CHANNEL_VERSION;
    line->data_bytes = end->bytes;
    line->peer = peer;
    line->head = 0;
    line->closed = 0;
    end->session = session ? session : 1;
    channel_order();
    line->session = end->session;
    return 1;
}

/* Room for a message of `length` bytes, in one piece; 0 when there is none yet, or on an error. */
CHANNEL_INLINE void *channel_reserve(struct channel_end *end, channel_u32 length)
{
    if (end->error)
        return 0;
    if (length > channel_longest(end))
        return channel_fail(end, CHANNEL_BAD_SIZE);
    struct channel_receiver_line *other = &end->area->receiver;
    if (other->session == end->session) {
        channel_u32 tail = other->tail;
        if (other->magic != CHANNEL_MAGIC)
            return channel_fail(end, CHANNEL_BAD_HEADER);
        if (other->closed)
            return channel_fail(end, CHANNEL_CLOSED);
        if (tail % CHANNEL_RECORD || tail - end->tail > end->head - end->tail)
            return channel_fail(end, CHANNEL_BAD_COUNT);
        end->tail = tail;
    }
    channel_u32 need = channel_need(length);
    channel_u32 before_end = end->bytes - (end->head & (end->bytes - 1));
    channel_u32 skip = need > before_end ? before_end : 0;
    if (end->bytes - (end->head - end->tail) < skip + need)
        return 0;
    if (skip)
        channel_write_record(end, end->head, CHANNEL_SKIP);
    end->head += skip; /* published together with the message */
    end->length = length;
    return end->area->ring + (end->head & (end->bytes - 1)) + CHANNEL_RECORD;
}

/* Sends the first `length` bytes of what was reserved last. */
CHANNEL_INLINE int channel_commit(struct channel_end *end, channel_u32 length)
{
    if (end->error)
        return 0;
    if (length > end->length) {
        end->error = CHANNEL_BAD_SIZE;
        return 0;
    }
    channel_write_record(end, end->head, length);
    end->head += channel_need(length);
    end->length = 0;
    channel_order();
    end->area->sender.head = end->head;
    channel_order();
    return 1;
}

CHANNEL_INLINE void channel_close_sender(struct channel_end *end)
{
    channel_order();
    end->area->sender.closed = 1;
}

/* Peer id + 1 to ring after a commit; 0 = nobody. The caller's doorbell ignores ids that are not there. */
CHANNEL_INLINE channel_u32 channel_sender_rings(const struct channel_end *end)
{
    channel_u32 peer = end->area->receiver.peer;
    return peer > 65536 ? 0 : peer;
}

/* Writes the own id, to be rung; the session is joined by channel_peek(). */
CHANNEL_INLINE int channel_open_receiver(struct channel_end *end, void *area, channel_u32 area_bytes, channel_u32 peer)
{
    if (!channel_init(end, area, area_bytes, peer))
        return 0;
    end->area->receiver.peer = peer;
    return 1;
}

CHANNEL_INLINE int channel_read_head(struct channel_end *end)
{
    channel_u32 head = end->area->sender.head;
    if (head % CHANNEL_RECORD || head - end->tail > end->bytes || head - end->tail < end->head - end->tail) {
        end->error = CHANNEL_BAD_COUNT;
        return 0;
    }
    end->head = head;
    channel_order();
    return 1;
}

CHANNEL_INLINE int channel_join(struct channel_end *end)
{
    struct channel_sender_line *other = &end->area->sender;
    struct channel_receiver_line *line = &end->area->receiver;
    channel_u32 session = other->session;
    if (!session)
        return 0;
    channel_order();
    if (other->magic != CHANNEL_MAGIC || other->version != CHANNEL_VERSION || other->data_bytes != end->bytes) {
        end->error = CHANNEL_BAD_HEADER;
        return 0;
    }
    /* one that went on in the same session left its tail here */
    channel_u32 tail = line->session == session && line->magic == CHANNEL_MAGIC ? line->tail : 0;
    end->head = end->tail = tail;
    if (tail % CHANNEL_RECORD) {
        end->error = CHANNEL_BAD_COUNT;
        return 0;
    }
    if (!channel_read_head(end))
        return 0;
    line->session = 0;
    line->magic = CHANNEL_MAGIC;
    line->peer = end->peer;
    line->tail = tail;
    line->closed = 0;
    channel_order();
    line->session = end->session = session;
    return 1;
}

/* The next message where it lies, and its length; 0 when there is none yet, or on an error. */
CHANNEL_INLINE const void *channel_peek(struct channel_end *end, channel_u32 *length)
{
    if (end->error || (!end->session && !channel_join(end)))
        return 0;
    if (end->head == end->tail) {
        if (end->area->sender.session != end->session)
            return channel_fail(end, CHANNEL_CLOSED);
        channel_u32 closed = end->area->sender.closed;
        channel_order();
        if (!channel_read_head(end))
            return 0;
        if (end->head == end->tail)
            return closed ? channel_fail(end, CHANNEL_CLOSED) : 0;
    }
    channel_u32 tail = end->tail;
    for (;;) {
        channel_u32 at = tail & (end->bytes - 1), before_end = end->bytes - at, in_flight = end->head - tail;
        struct channel_record *record = (struct channel_record *)(end->area->ring + at);
        channel_u32 size = record->length;
        if (record->position != tail || record->session != end->session || record->zero)
            return channel_fail(end, CHANNEL_BAD_RECORD);
        if (size == CHANNEL_SKIP) {
            if (at == 0 || in_flight <= before_end)
                return channel_fail(end, CHANNEL_BAD_RECORD);
            tail += before_end;
            continue;
        }
        if (size > channel_longest(end) || channel_need(size) > in_flight || channel_need(size) > before_end)
            return channel_fail(end, CHANNEL_BAD_RECORD);
        end->start = tail + channel_need(size);
        end->length = 1;
        *length = size;
        return end->area->ring + at + CHANNEL_RECORD;
    }
}

/* Gives the room of what was peeked back. True when the sender is to be rung. */
CHANNEL_INLINE int channel_release(struct channel_end *end)
{
    if (end->error || !end->length)
        return 0;
    channel_u32 before = end->tail;
    end->tail = end->start;
    end->length = 0;
    channel_order();
    end->area->receiver.tail = end->tail;
    channel_order();
    return end->tail == end->head || ((before ^ end->tail) & ~((end->bytes - 1) >> 2)) != 0;
}

CHANNEL_INLINE void channel_close_receiver(struct channel_end *end)
{
    channel_order();
    end->area->receiver.closed = 1;
}

/* Peer id + 1 to ring when channel_release() says so; 0 = nobody. */
CHANNEL_INLINE channel_u32 channel_receiver_rings(const struct channel_end *end)
{
    channel_u32 peer = end->area->sender.peer;
    return peer > 65536 ? 0 : peer;
}

#endif
