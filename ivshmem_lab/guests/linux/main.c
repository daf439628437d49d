/* The command line. */
#include "options.h"

static const char help[] =
    "usage: " PROGRAM " COMMAND ...\n"
    "\n"
    "An ivshmem device (1af4:1110) from an application of Linux: its memory and doorbell by sysfs, its interrupts by VFIO.\n"
    "Results are one JSON object on standard output. Waiting commands say \"ready\" on standard error first.\n"
    "\n"
    "commands:\n"
    "  info                           every ivshmem device, its peer id, vectors and memory\n"
    "  read OFFSET LENGTH [--raw]     bytes of the shared memory\n"
    "  write OFFSET --text T | --hex H | --stdin\n"
    "  ring PEER VECTOR [--count N]   interrupt a peer\n"
    "  wait VECTOR [--count N] [--timeout S]\n"
    "                                 wait for interrupts (VFIO)\n"
    "  pingpong ping|pong PEER [--vector V] [--rounds N] [--warmup N] [--timeout S] [--samples]\n"
    "                                 interrupts there and back (VFIO); start pong first\n"
    "  stream send|receive [--offset O] [--ring N] [--bytes N] [--message N] [--vector V] [--timeout S] [--poll]\n"
    "                                 bytes with checksums through a channel; --poll: without interrupts\n"
    "  tcp-pingpong, tcp-stream  serve | connect ADDRESS  [--port P] [--rounds N] [--bytes N]\n"
    "                                 the same over a network, to compare with\n"
    "  agent PORT                     run commands for the host that come through a device file\n"
    "\n"
    "  --device BDF                   which device, when there are several: 0000:00:03.0\n"
    "\n"
    "Numbers may be 0x… and end with K, M or G.\n"
    "\n"
    "examples:\n"
    "  " PROGRAM " info\n"
    "  " PROGRAM " write 0 --text hello && " PROGRAM " read 0 5\n"
    "  " PROGRAM " ring 1 0\n"
    "  " PROGRAM " pingpong pong 0 --rounds 10000        on peer 1\n"
    "  " PROGRAM " pingpong ping 1 --rounds 10000        on peer 0\n"
    "  " PROGRAM " stream receive --bytes 256M --poll    and `stream send …` on another\n"
    "\n"
    "Interrupts need vfio-pci and an IOMMU: QEMU with -machine q35 -device intel-iommu,intremap=on, the kernel with\n"
    "intel_iommu=on. Run as root. Exit status: 0 done, 1 failed, 2 wrong call.\n";

int read_options(int count, char **words, const struct option *options)
{
    int left = 0;
    for (int at = 0; at < count; at++) {
        if (!starts_with(words[at], "--")) {
            words[left++] = words[at];
            continue;
        }
        const struct option *option = options;
        while (option->name && !same(option->name, words[at]))
            option++;
        if (!option->name)
            wrong_call("option %s is not known here", words[at]);
        if (option->flag) {
            *option->flag = 1;
            continue;
        }
        if (++at == count)
            wrong_call("option %s needs a value", option->name);
        if (option->text)
            *option->text = words[at];
        else
            *option->number = need_number(words[at], option->name, ~0ull);
    }
    return left;
}

u64 need_number(const char *word, const char *what, u64 most)
{
    u64 value;
    if (!read_number(word, &value))
        wrong_call("%s %s is no number such as 4096, 0x1000 or 64K", what, word);
    if (value > most)
        wrong_call("%s %s is too large: at most %U", what, word, most);
    return value;
}

static const struct {
    const char *name;
    int (*run)(int count, char **words);
} commands[] = {{"info", run_info},
                {"read", run_read},
                {"write", run_write},
                {"ring", run_ring},
                {"wait", run_wait},
                {"pingpong", run_pingpong},
                {"stream", run_stream},
                {"tcp-pingpong", run_tcp_pingpong},
                {"tcp-stream", run_tcp_stream},
                {"agent", run_agent}};

int main(int argc, char **argv)
{
    if (argc < 2)
        wrong_call("no command is given");
    for (int i = 1; i < argc; i++)
        if (same(argv[i], "--help") || same(argv[i], "-h")) {
            put_output(help, sizeof help - 1);
            return 0;
        }
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++)
        if (same(argv[1], commands[i].name))
            return commands[i].run(argc - 2, argv + 2);
    wrong_call("command %s is not known", argv[1]);
}
