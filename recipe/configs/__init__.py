"""Presets: small files with the differences from the paper's defaults in recipe/config.py."""
