"""Faults that long runs meet."""
