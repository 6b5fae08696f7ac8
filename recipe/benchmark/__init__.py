"""Frameworks and their peers, side by side on the same network and the same images: `python -m recipe.benchmark`."""
