"""Presets, one small file each: only what differs from the paper's defaults in recipe/config.py."""
