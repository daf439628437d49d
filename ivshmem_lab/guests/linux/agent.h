/* What goes between the host and the agent in the guest: frames of a head and so many bytes. Little endian.
 * The host's side is ivshmem_lab/vm/agent.py. */
#ifndef AGENT_H
#define AGENT_H

#include "sys.h"

#define AGENT_MAGIC 0x47414956u /* "VIAG" */
#define AGENT_MOST_BYTES 32768u /* of a frame, without its head */

struct frame {
    u32 magic, type, job, bytes;
};

enum frame_type {
    /* to the guest */
    FRAME_INPUT = 1, /* bytes for the standard input of a job that is to be run */
    FRAME_RUN = 2,   /* its words, each ended by 0 */
    FRAME_KILL = 3,  /* SIGKILL to it and all of its process group */
    /* to the host */
    FRAME_HELLO = 16, /* the agent is there; text */
    FRAME_OUTPUT = 17,
    FRAME_ERROR = 18,
    FRAME_EXIT = 19,   /* u32: the status of waitpid() */
    FRAME_FAILED = 20, /* u32: errno; it could not be run */
};

#endif
