/* agent: runs commands for the host. It may be process 1, so it also buries orphans. */
#include "agent.h"
#include "options.h"

#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/poll.h>
#include <linux/signal.h>
#include <linux/wait.h>

enum { MOST_JOBS = 32 };

struct job {
    u32 number;
    int used;
    long pid;        /* 0: it gets its input still */
    int input;       /* an anonymous file */
    int pipes[2];    /* its output and errors, -1 when at their end */
};

static struct job jobs[MOST_JOBS];
static int port;

static void send_frame(u32 type, u32 number, const void *bytes, u32 size)
{
    static u8 whole[sizeof(struct frame) + AGENT_MOST_BYTES];
    struct frame head = {AGENT_MAGIC, type, number, size};
    memcpy(whole, &head, sizeof head);
    memcpy(whole + sizeof head, bytes, size);
    for (const u8 *from = whole, *end = whole + sizeof head + size; from < end;) {
        long count = sys(__NR_write, port, from, end - from);
        if (count > 0)
            from += count;
        else if (count == -11 || count == 0) { /* the host does not read just now */
            struct pollfd waiting = {.fd = port, .events = POLLOUT};
            sys(__NR_poll, &waiting, 1, 100);
        } else if (count != -4)
            fail(count, "the host's port");
    }
}

static void read_whole(void *to, size_t size)
{
    u8 *at = to;
    while (size) {
        long count = sys(__NR_read, port, at, size);
        if (count > 0)
            at += count, size -= (size_t)count;
        else if (count == -11 || count == 0) { /* nobody at the other end just now */
            struct pollfd waiting = {.fd = port, .events = POLLIN};
            sys(__NR_poll, &waiting, 1, 100);
        } else if (count != -4)
            fail(count, "the host's port");
    }
}

static struct job *find_job(u32 number, int make)
{
    struct job *empty = 0;
    for (int i = 0; i < MOST_JOBS; i++) {
        if (jobs[i].used && jobs[i].number == number)
            return &jobs[i];
        if (!jobs[i].used && !empty)
            empty = &jobs[i];
    }
    if (!make || !empty)
        return 0;
    *empty = (struct job){.number = number, .used = 1, .input = -1, .pipes = {-1, -1}};
    return empty;
}

static void send_failure(u32 number, long error)
{
    u32 value = (u32)-error;
    send_frame(FRAME_FAILED, number, &value, sizeof value);
}

static void end_job(struct job *job)
{
    for (int i = 0; i < 2; i++)
        if (job->pipes[i] >= 0)
            sys(__NR_close, job->pipes[i]);
    if (job->input >= 0)
        sys(__NR_close, job->input);
    job->used = 0;
}

static long take_input(struct job *job, const void *bytes, u32 size)
{
    if (job->input < 0) {
        long fd = sys(__NR_memfd_create, "input", 1 /* MFD_CLOEXEC */);
        if (fd < 0)
            return fd;
        job->input = (int)fd;
    }
    return write_all(job->input, bytes, size);
}

static _Noreturn void become(struct job *job, char **words, int outputs[2], int report)
{
    static const char *const environment[] = {"PATH=/bin:/sbin:/usr/bin:/usr/sbin", "HOME=/root", "TERM=dumb", 0};
    static const char *const places[] = {"/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/"};
    u64 no_signals = 0;
    sys(__NR_rt_sigprocmask, SIG_SETMASK, &no_signals, 0, sizeof no_signals);
    sys(__NR_setsid, 0);
    long input = job->input >= 0 ? job->input : open_file("/dev/null", O_RDONLY);
    if (job->input >= 0)
        sys(__NR_lseek, input, 0, 0);
    sys(__NR_dup2, input, 0);
    sys(__NR_dup2, outputs[0], 1);
    sys(__NR_dup2, outputs[1], 2);
    long error = -2;
    int slash = 0;
    for (const char *at = words[0]; *at; at++)
        slash |= *at == '/';
    if (slash)
        error = sys(__NR_execve, words[0], words, environment);
    for (int i = 0; !slash && i < 4; i++) {
        char path[512];
        format(path, sizeof path, "%s%s", places[i], words[0]);
        long now = sys(__NR_execve, path, words, environment);
        error = now == -2 ? error : now;
    }
    u32 value = (u32)-error;
    sys(__NR_write, report, &value, sizeof value);
    sys(__NR_exit_group, 127);
    __builtin_unreachable();
}

static void run(struct job *job, u8 *text, u32 size)
{
    char *words[256];
    u32 count = 0;
    for (u32 at = 0; at < size && count < 255; at += (u32)length_of((char *)text + at) + 1)
        words[count++] = (char *)text + at;
    words[count] = 0;
    int pipes[3][2];
    long error = count && size && !text[size - 1] ? 0 : -22;
    int made = 0;
    while (!error && made < 3 && !(error = sys(__NR_pipe2, pipes[made], O_CLOEXEC)))
        made++;
    long pid = error ? 0 : sys(__NR_fork, 0);
    if (!error && pid == 0)
        become(job, words, (int[]){pipes[0][1], pipes[1][1]}, pipes[2][1]);
    error = pid < 0 ? pid : error;
    for (int i = 0; i < made; i++)
        sys(__NR_close, pipes[i][1]);
    u32 value = 0;
    if (!error && sys(__NR_read, pipes[2][0], &value, sizeof value) == sizeof value)
        error = -(long)value; /* execve failed; its process is reaped with the others */
    if (made == 3)
        sys(__NR_close, pipes[2][0]);
    for (int i = 0; error && i < made && i < 2; i++)
        sys(__NR_close, pipes[i][0]);
    if (error) {
        send_failure(job->number, error);
        end_job(job);
        return;
    }
    job->pid = pid;
    for (int i = 0; i < 2; i++) {
        job->pipes[i] = pipes[i][0];
        sys(__NR_fcntl, pipes[i][0], F_SETFL, O_NONBLOCK);
    }
}

/* Passes on what a job has written; 0 when there is nothing (more) just now. */
static int pass_on(struct job *job, int which)
{
    static u8 bytes[AGENT_MOST_BYTES];
    if (job->pipes[which] < 0)
        return 0;
    long count = sys(__NR_read, job->pipes[which], bytes, sizeof bytes);
    if (count > 0) {
        send_frame(which ? FRAME_ERROR : FRAME_OUTPUT, job->number, bytes, (u32)count);
        return 1;
    }
    if (count != -11 && count != -4) {
        sys(__NR_close, job->pipes[which]);
        job->pipes[which] = -1;
    }
    return 0;
}

static void bury(void)
{
    i32 status;
    long pid;
    while ((pid = sys(__NR_wait4, -1, &status, WNOHANG, 0)) > 0)
        for (int i = 0; i < MOST_JOBS; i++)
            if (jobs[i].used && jobs[i].pid == pid) {
                /* What it wrote is there; those whom it left in the background are not waited for. A flood of theirs ends here. */
                for (int which = 0; which < 2; which++)
                    for (int parts = 0; parts < 64 && pass_on(&jobs[i], which); parts++)
                        ;
                send_frame(FRAME_EXIT, jobs[i].number, &status, sizeof status);
                end_job(&jobs[i]);
            }
}

static void obey(void)
{
    static u8 bytes[AGENT_MOST_BYTES + 1];
    struct frame head;
    read_whole(&head, sizeof head);
    if (head.magic != AGENT_MAGIC || head.bytes > AGENT_MOST_BYTES)
        fail(0, "the host sent no frame but %x %x %x %x", head.magic, head.type, head.job, head.bytes);
    read_whole(bytes, head.bytes);
    struct job *job = find_job(head.job, head.type != FRAME_KILL);
    if (head.type == FRAME_KILL) {
        if (job && job->pid)
            sys(__NR_kill, -job->pid, 9);
        else if (job)
            end_job(job); /* one of which only input has come */
        return;
    }
    if (!job) {
        send_failure(head.job, -11);
        return;
    }
    long error = job->pid ? -22 : 0;
    if (!error && head.type == FRAME_INPUT)
        error = take_input(job, bytes, head.bytes);
    else if (!error && head.type == FRAME_RUN)
        run(job, bytes, head.bytes);
    if (error) {
        send_failure(head.job, error);
        if (!job->pid)
            end_job(job);
    }
}

int run_agent(int count, char **words)
{
    if (read_options(count, words, (struct option[]){{0}}) != 1)
        wrong_call("agent takes PORT, a device file");
    long fd = open_file(words[0], O_RDWR | O_NONBLOCK);
    if (fd < 0)
        fail(fd, "%s", words[0]);
    port = (int)fd;
    u64 child_ended = 1ull << (17 - 1); /* SIGCHLD */
    sys(__NR_rt_sigprocmask, SIG_BLOCK, &child_ended, 0, sizeof child_ended);
    long signals = sys(__NR_signalfd4, -1, &child_ended, sizeof child_ended, O_NONBLOCK | O_CLOEXEC);
    if (signals < 0)
        fail(signals, "signalfd");
    send_frame(FRAME_HELLO, 0, "1", 1);
    for (;;) {
        struct pollfd waiting[2 + 2 * MOST_JOBS];
        u32 watched = 2;
        waiting[0] = (struct pollfd){.fd = port, .events = POLLIN};
        waiting[1] = (struct pollfd){.fd = (int)signals, .events = POLLIN};
        for (int i = 0; i < MOST_JOBS; i++)
            for (int which = 0; jobs[i].used && which < 2; which++)
                if (jobs[i].pipes[which] >= 0)
                    waiting[watched++] = (struct pollfd){.fd = jobs[i].pipes[which], .events = POLLIN};
        sys(__NR_poll, waiting, watched, -1);
        for (int i = 0; i < MOST_JOBS; i++)
            for (int which = 0; jobs[i].used && which < 2; which++)
                pass_on(&jobs[i], which);
        if (waiting[1].revents) {
            u8 news[128];
            while (sys(__NR_read, signals, news, sizeof news) > 0)
                ;
        }
        bury();
        if (waiting[0].revents & POLLIN)
            obey();
        else if (waiting[0].revents)
            sys(__NR_poll, 0, 0, 100); /* the host is away: the port says so without end */
    }
}
