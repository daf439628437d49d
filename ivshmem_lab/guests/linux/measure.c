/* Round trips and streams: what is logged, and what is checked. */
#include "measure.h"

void begin_trips(struct trips *trips, u64 most)
{
    trips->most = most;
    trips->count = 0;
    trips->ns = map_memory((most ? most : 1) * 2 * sizeof(u64)); /* the second half is for sorting */
}

static void sort(u64 *values, u64 count) /* heap sort: no recursion, no library */
{
    for (u64 end = count, root = count / 2; end > 1;) {
        if (root)
            root--;
        else {
            u64 last = values[--end];
            values[end] = values[0];
            values[0] = last;
        }
        for (u64 at = root, child; (child = 2 * at + 1) < end; at = child) {
            if (child + 1 < end && values[child + 1] > values[child])
                child++;
            if (values[at] >= values[child])
                break;
            u64 other = values[at];
            values[at] = values[child];
            values[child] = other;
        }
    }
}

void say_trips(struct trips *trips, int samples)
{
    u64 *sorted = trips->ns + trips->most, count = trips->count;
    if (!count)
        return;
    memcpy(sorted, trips->ns, count * sizeof(u64));
    sort(sorted, count);
    say("\"min_ns\": %U, \"p50_ns\": %U, \"p90_ns\": %U, \"p99_ns\": %U, \"max_ns\": %U", sorted[0],
        sorted[(count - 1) / 2], sorted[(count * 90 + 99) / 100 - 1], sorted[(count * 99 + 99) / 100 - 1],
        sorted[count - 1]);
    if (!samples)
        return;
    for (u64 i = 0; i < count; i++)
        say("%s%U", i ? "," : ", \"samples_ns\": [", trips->ns[i]);
    say("]");
}

void fill_block(void *block, size_t size, u64 number)
{
    u64 *words = block, state = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < size / 8; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17; /* Marsaglia, Xorshift RNGs, 2003 */
        words[i] = state;
    }
    words[0] = number;
}

void add_block(struct sums *sums, const void *block, size_t size)
{
    const u64 *words = block;
    u64 first = sums->first, second = sums->second;
    for (size_t i = 0; i < size / 8; i++) {
        first += words[i];
        second += first;
    }
    sums->first = first, sums->second = second;
}

struct sums sums_of(u64 count, size_t size, void *block)
{
    struct sums sums = {0, 0};
    for (u64 number = 0; number < count; number++) {
        *(u64 *)block = number;
        add_block(&sums, block, size);
    }
    return sums;
}
