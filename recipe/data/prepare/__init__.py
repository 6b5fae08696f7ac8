"""Prepares data sets, once, before they are read."""
