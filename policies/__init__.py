"""Policies with one number to tune: simple ones, supervised ones, and the trained head."""
