"""Percentiles, intervals and tables."""
