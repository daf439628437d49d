"""What touches the operating system: shared memory, eventfds, passed file descriptors, where sockets live."""
