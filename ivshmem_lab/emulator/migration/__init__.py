"""Moving a running machine to another process: stop, copy, go on.

The stream is this emulator's own (`stream`); commands, events, states and refusals are those of QEMU 7.2.

1. `description`: what a machine is made of, and whether the destination is made of the same.
2. `memory`: guest memory and shared memory, without the pages that hold nothing.
3. `outgoing` and `incoming`: the two ends of the conversation.
4. `manager`: what QMP sees of it.
"""
