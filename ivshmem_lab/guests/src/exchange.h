/* The words in shared memory that guests and host agree on; the host's side of the same layout is exchange.py.
 *
 * All u32, little endian. Every word has one writer: a mailbox's owner writes state, owner, done, received, sent, status and zeroes
 * its line at start; the others write the rest. Offsets are from the start of the shared memory.
 */
#ifndef EXCHANGE_H
#define EXCHANGE_H
#include "runtime.h"

#define MAILBOXES 1024
#define LINE_BYTES 64

enum { STATE_ABSENT, STATE_READY, STATE_BUSY };
enum { STATUS_OK, STATUS_NO_TARGET, STATUS_BAD_LOG, STATUS_SELF };

struct mailbox {
    volatile u32 state;
    volatile u32 owner;      /* peer id + 1 */
    volatile u32 reply_to;   /* peer id + 1 to ring back on the same vector; 0 = nobody */
    volatile u32 command;    /* the controller increments it, then rings vector 0 */
    volatile u32 done;       /* last command finished */
    volatile u32 target;     /* peer id to ping */
    volatile u32 rounds;
    volatile u32 warmup;
    volatile u32 log_offset; /* byte offset of rounds u32: TSC cycles of each round trip; 0 = no log */
    volatile u32 received;   /* interrupts taken since start */
    volatile u32 sent;       /* doorbells rung since start */
    volatile u32 controller; /* peer id + 1 to ring on vector 0 when a block is done; 0 = nobody */
    volatile u32 status;
    volatile u32 reserved[3];
};

#define RING_DATA 4096 /* from the ring's start to slot 0 */

struct producer_line {
    volatile u32 session; /* written last: the line is valid */
    volatile u32 producer; /* peer id + 1 */
    volatile u32 head; /* chunks published */
    volatile u32 chunk_bytes;
    volatile u32 slots;
    volatile u32 total_chunks;
    volatile u32 checksum; /* of the chunks published */
    volatile u32 total_cycles[2];
    volatile u32 write_cycles[2];
    volatile u32 reserved[5];
};

struct consumer_line {
    volatile u32 session;
    volatile u32 consumer; /* peer id + 1 */
    volatile u32 tail; /* chunks consumed */
    volatile u32 checksum;
    volatile u32 read_cycles[2];
    volatile u32 total_cycles[2];
    volatile u32 finished;
    volatile u32 reserved[7];
};

ALWAYS_INLINE void clear_line(void *line)
{
    for (u32 i = 0; i < LINE_BYTES / 4; i++)
        ((volatile u32 *)line)[i] = 0;
}

#endif
