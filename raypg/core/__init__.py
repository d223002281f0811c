"""Decisions without Ray, I/O or a clock of their own: plain functions and state machines, tested in milliseconds."""
