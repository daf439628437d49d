/* What the measurements have in common: round trips that are logged one by one, and the bytes of a stream. */
#ifndef MEASURE_H
#define MEASURE_H

#include "sys.h"

struct trips {
    u64 *ns; /* of each round */
    u64 count, most;
};

void begin_trips(struct trips *trips, u64 most);
static inline void note_trip(struct trips *trips, u64 ns)
{
    if (trips->count < trips->most)
        trips->ns[trips->count++] = ns;
}
/* Writes "min_ns":…,"p50_ns":… and, when asked, "samples_ns":[…] (in the order of the rounds), without braces. */
void say_trips(struct trips *trips, int samples);

/* Bytes of a stream: a block that does not compress, and its number in its first 8 bytes. */
void fill_block(void *block, size_t size, u64 number);
/* Two sums of all 64-bit words so far: the second one tells when two change places. */
struct sums {
    u64 first, second;
};
void add_block(struct sums *sums, const void *block, size_t size);
/* The sums of `count` blocks that were made by fill_block(). */
struct sums sums_of(u64 count, size_t size, void *block);

#endif
