"""Widgets for notebooks: the lab to look at and to work with."""
