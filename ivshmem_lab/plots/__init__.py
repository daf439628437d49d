"""Figures: an Axes goes in, an Axes comes out; nothing here needs a display."""
