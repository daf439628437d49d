"""Measurements: round trips, bytes through shared memory, the server, and the circumstances of all of them."""
