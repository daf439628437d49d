"""Measurements: round trips of interrupts, bytes through shared memory, and the circumstances of both."""
