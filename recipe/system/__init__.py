"""This machine: its terminal, files, clock and processor. Knows nothing of ranks."""
