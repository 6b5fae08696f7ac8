"""Presets, one small file each: only the differences from the paper's defaults in recipe/config.py."""
