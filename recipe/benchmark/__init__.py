"""Frameworks and their peers on the same network and images: `python -m recipe.benchmark`."""
