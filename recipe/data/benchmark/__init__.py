"""The input pipeline against its peers: `python -m recipe.data.benchmark`."""
