/* The C end of a channel in a memory that the test made: channel_host FD AREA_BYTES send|receive|fuzz COUNT */
#include "channel.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* Message i: byte j is i + j. */
static channel_u32 size_of(channel_u32 i) { return i * 37 % 3000 % 2000; }

static int send_all(struct channel_end *end, channel_u32 count)
{
    for (channel_u32 i = 0; i < count; i++) {
        channel_u32 size = size_of(i);
        channel_u8 *room;
        while (!(room = channel_reserve(end, size))) {
            if (end->error)
                return end->error;
            sched_yield();
        }
        for (channel_u32 j = 0; j < size; j++)
            room[j] = (channel_u8)(i + j);
        channel_commit(end, size);
    }
    channel_close_sender(end);
    return 0;
}

static int receive_all(struct channel_end *end, channel_u32 count)
{
    for (channel_u32 i = 0;; i++) {
        const channel_u8 *message;
        channel_u32 size;
        while (!(message = channel_peek(end, &size))) {
            if (end->error)
                return end->error == CHANNEL_CLOSED && i == count ? 0 : 100 + (int)end->error;
            sched_yield();
        }
        if (size != size_of(i))
            return 50;
        for (channel_u32 j = 0; j < size; j++)
            if (message[j] != (channel_u8)(i + j))
                return 51;
        channel_release(end);
    }
}

/* Both ends in a memory with forbidden pages around it; random words of it are spoilt. A step outside is a SIGSEGV. */
static int fuzz(channel_u32 count)
{
    const channel_u32 area_bytes = CHANNEL_HEADER + 2048;
    channel_u8 *pages = mmap(0, 3 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(pages + 4096, 4096, PROT_READ | PROT_WRITE);
    volatile channel_u8 sum = 0;
    channel_u32 errors = 0, taken = 0;
    srand(1);
    for (channel_u32 round = 0; round < count; round++) {
        /* at the end of the page, and at its start in every other round */
        channel_u8 *area = pages + 4096 + (round % 2 ? 0 : 4096 - area_bytes);
        struct channel_end sender, receiver;
        channel_open_sender(&sender, area, area_bytes, 0);
        channel_open_receiver(&receiver, area, area_bytes, 0);
        for (int step = 0; step < 12; step++) {
            channel_u32 size = (channel_u32)rand() % 1009, length;
            channel_u8 *room = channel_reserve(&sender, size);
            if (room) {
                memset(room, 1, size);
                channel_commit(&sender, size);
            }
            if (step > 2) {
                static const channel_u32 nasty[] = {0, 1, 16, 1008, 1009, 2048, 0x80000000u, 0xFFFFFFF0u, CHANNEL_SKIP};
                channel_u32 word = (channel_u32)rand() % (rand() % 2 ? CHANNEL_HEADER / 4 : area_bytes / 4);
                ((volatile channel_u32 *)area)[word] = rand() % 2 ? nasty[rand() % 9] : (channel_u32)rand();
            }
            const channel_u8 *message = channel_peek(&receiver, &length);
            if (message) {
                taken++;
                for (channel_u32 j = 0; j < length; j++)
                    sum += message[j];
                channel_release(&receiver);
            }
        }
        errors += sender.error != 0;
        errors += receiver.error != 0;
    }
    printf("taken %u errors %u\n", taken, errors);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    channel_u32 area_bytes = (channel_u32)atoi(argv[2]), count = (channel_u32)atoi(argv[4]);
    if (!strcmp(argv[3], "fuzz"))
        return fuzz(count);
    void *area = mmap(0, area_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[1]), 0);
    struct channel_end end;
    if (area == MAP_FAILED)
        return 3;
    if (!strcmp(argv[3], "send"))
        return channel_open_sender(&end, area, area_bytes, 0) ? send_all(&end, count) : 4;
    return channel_open_receiver(&end, area, area_bytes, 0) ? receive_all(&end, count) : 4;
}
