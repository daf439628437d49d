"""Measurements: what was measured, how, and what it was compared with in the same run."""
