"""Horovod's ranks: how they start, speak and leave. Knows no recipe."""
