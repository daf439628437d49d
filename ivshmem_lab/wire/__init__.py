"""The wire between server and peer, protocol version 0: codec and state machines without sockets."""
