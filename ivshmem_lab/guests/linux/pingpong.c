/* pingpong: interrupts there and back, each counted, each round timed. */
#include "device.h"
#include "measure.h"
#include "options.h"

static _Noreturn void came_late(u64 rounds, u64 wanted, u64 interrupts)
{
    say("{\"rounds\": %U, \"interrupts\": %U}\n", rounds, interrupts);
    fail(0, "no interrupt in time after %U of %U rounds; is the other side there, and ready?", rounds, wanted);
}

int run_pingpong(int count, char **words)
{
    static struct interrupts interrupts;
    const char *bdf = 0;
    u64 vector = 0, rounds = 1000, warmup = 100, limit_s = 10, arrived = 0;
    int samples = 0;
    struct device device;
    struct trips trips;
    count = read_options(count, words,
                         (struct option[]){{"--device", .text = &bdf},
                                           {"--vector", .number = &vector},
                                           {"--rounds", .number = &rounds},
                                           {"--warmup", .number = &warmup},
                                           {"--timeout", .number = &limit_s},
                                           {"--samples", .flag = &samples},
                                           {0}});
    if (count != 2 || !(same(words[0], "ping") || same(words[0], "pong")))
        wrong_call("pingpong takes ping or pong, and PEER");
    int first = same(words[0], "ping");
    u32 peer = (u32)need_number(words[1], "PEER", 65535);
    if (rounds > 10000000 || warmup > 10000000)
        wrong_call("at most 10000000 rounds");
    find_device(&device, bdf);
    take_interrupts(&device, &interrupts);
    if (vector >= interrupts.count)
        wrong_call("vector %U is not there: the device has %u", vector, interrupts.count);
    begin_trips(&trips, first ? rounds : 0);
    say_error("ready");
    u64 start_ns = 0;
    for (u64 round = 0; round < warmup + rounds; round++) {
        u64 now = now_ns();
        if (round == warmup)
            start_ns = now;
        if (first)
            ring(&device, peer, (u32)vector);
        u64 came = wait_vector(&interrupts, (u32)vector, now + limit_s * 1000000000u);
        if (!came)
            came_late(round, warmup + rounds, arrived);
        arrived += came;
        if (!first)
            ring(&device, peer, (u32)vector);
        else if (round >= warmup)
            note_trip(&trips, now_ns() - now);
    }
    say("{\"role\": %j, \"peer\": %u, \"vector\": %U, \"rounds\": %U, \"warmup\": %U, \"interrupts\": %U, "
        "\"total_ns\": %U",
        words[0], peer, vector, rounds, warmup, arrived, now_ns() - start_ns);
    if (first && rounds) {
        say(", ");
        say_trips(&trips, samples);
    }
    say("}\n");
    if (arrived != warmup + rounds)
        fail(0, "%U interrupts came in %U rounds; something else rings vector %U, too", arrived, warmup + rounds,
             vector);
    return 0;
}
