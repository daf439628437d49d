"""The server that joins machines and processes over one shared memory."""
