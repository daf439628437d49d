/* Reading the words after a command. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include "sys.h"

struct option {
    const char *name; /* "--rounds"; 0 ends the list */
    u64 *number;      /* where a number goes, or 0 */
    const char **text;
    int *flag; /* one without a value */
};

/* Takes the options out of `words`; returns how many words are left, which are then at its start. */
int read_options(int count, char **words, const struct option *options);
u64 need_number(const char *word, const char *what, u64 most);

/* The commands, one file each or a few; each returns the program's exit status. */
int run_info(int count, char **words);
int run_read(int count, char **words);
int run_write(int count, char **words);
int run_ring(int count, char **words);
int run_wait(int count, char **words);
int run_pingpong(int count, char **words);
int run_stream(int count, char **words);
int run_tcp_pingpong(int count, char **words);
int run_tcp_stream(int count, char **words);
int run_agent(int count, char **words);

#endif
